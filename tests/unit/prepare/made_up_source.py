"""Small sources that the tests of the prepare package share."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
from PIL import Image


def write_image(path: Path, width: int = 12, height: int = 9, seed: int = 0) -> bytes:
    """Write a noisy image; returns its file's bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """One row a line; text goes in as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def llava(number: int, *images: str) -> dict[str, Any]:
    """A row of LLaVA's."""
    turns = [
        {"from": "human", "value": "<image>\n" * len(images) + f"what is {number}"},
        {"from": "gpt", "value": f"it is caf\u00e9 {number}"},
    ]
    row: dict[str, Any] = {"id": number, "conversations": turns}
    return row | ({"image": images[0] if len(images) == 1 else list(images)} if images else {})
