"""Damages images, rows and shards at random, and checks that nothing of it is lost without a word.

The tests run a short form. ``python tests/unit/prepare/fuzzer.py 10000`` is the long one.
"""

import copy
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from megavlm.data import DATASETS
from megavlm.data.image import ImageError, load_image
from megavlm.prepare import FormatOptions, ImageLimits, PrepareSettings, prepare

ROWS_AT_ONCE = 40
MOST_SECONDS = 60.0
"""Of one batch of inputs; far more than any takes."""

_WRONG = (None, True, -1, 10**400, 1e308, "", "\ud800", "x" * 5000, [], {}, [[[]]], {"path": 3}, "<image>" * 9, "\0")


def damage_bytes(content: bytes, chance: random.Random) -> bytes:
    """Cut off, flip bits, swap, repeat, blow up, or replace a part."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if not data:
            break
        place, other = chance.randrange(len(data)), chance.randrange(len(data))
        low, high = min(place, other), max(place, other)
        how = chance.randrange(7)
        if how == 0:
            del data[place:]
        elif how == 1:
            data[place] ^= 1 << chance.randrange(8)
        elif how == 2:
            data[low:high] = data[low:high][::-1]
        elif how == 3:
            data[place:place] = data[low : low + 4096] * chance.randrange(1, 4)
        elif how == 4:
            data[place : place + 4] = b"\xff\xff\xff\x7f"
        elif how == 5:
            del data[low : low + 64]
        else:
            data[low : low + 16] = chance.randbytes(16)
    return bytes(data)


def damage_row(row: Any, chance: random.Random) -> Any:
    """Replace, remove or repeat a value somewhere in a row."""
    row = copy.deepcopy(row)
    holder, key = None, None
    value = row
    while isinstance(value, dict | list) and value and (holder is None or chance.random() < 0.7):
        holder, key = value, chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = holder[key]
    if holder is None:
        return chance.choice(_WRONG)
    how = chance.randrange(4)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, list):
        holder.extend(holder * 2)
    elif how == 2 and isinstance(holder, dict):
        holder[chance.choice(("image", "text", "messages", "texts", "weight", "boxes", "role", "system"))] = value
    else:
        holder[key] = chance.choice(_WRONG)
    return row


def good_rows() -> list[dict[str, Any]]:
    """Rows of every shape; their images are called 0, 1 and 2."""
    part = {"type": "image_url", "image_url": {"url": "1"}}
    return [
        {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}], "image": "0"},
        {
            "messages": [
                {"role": "user", "content": [part, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c"},
            ]
        },
        {"texts": ["d", None, "e"], "images": [None, "2", None]},
        {"text": "f <image> g", "image": ["0"]},
        {"question": "<box>?", "answer": "h", "image": "1", "boxes": [[0, 0, 1, 1]], "coordinates": "unit"},
        {"caption": "i", "image": "2", "prompt": "?"},
    ]


def good_images(chance: random.Random) -> list[bytes]:
    """An image of each of several formats."""
    found = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        pixels = numpy.frombuffer(chance.randbytes(24 * 16 * 3), dtype=numpy.uint8).reshape(16, 24, 3)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        found.append(stream.getvalue())
    return found


def fuzz_source(folder: Path, chance: random.Random, count: int) -> Counter[str]:
    """Prepare so many damaged rows and images; every one must be a sample that can be read, or be listed."""
    images, rows = good_images(chance), good_rows()
    lines: list[bytes] = []
    for number in range(count):
        for name in range(3):
            content = chance.choice(images)
            bad = damage_bytes(content, chance) if chance.random() < 0.5 else content
            (folder / f"{number}_{name}").write_bytes(bad)
        row = chance.choice(rows)
        line = json.dumps(damage_row(row, chance) if chance.random() < 0.5 else row)
        line = line.replace('"0"', f'"{number}_0"').replace('"1"', f'"{number}_1"').replace('"2"', f'"{number}_2"')
        lines.append(damage_bytes(line.encode(), chance) if chance.random() < 0.2 else line.encode())
    source = folder / "rows.jsonl"
    source.write_bytes(b"\n".join([*lines, b'{"text": "one that is good"}']) + b"\n")
    limits = ImageLimits(max_image_pixels=100_000, max_image_bytes=1 << 20)
    settings = PrepareSettings(
        num_workers=0, samples_per_shard=16, options=FormatOptions(max_row_bytes=20_000), limits=limits
    )
    prepared = prepare(source, folder / "out", settings)
    listed = [json.loads(line) for line in (folder / "out/bad_rows.jsonl").read_text().splitlines()]
    assert prepared.num_samples + prepared.num_bad_rows == prepared.num_items, prepared
    assert len(listed) == prepared.num_bad_rows + prepared.num_bad_images == sum(prepared.reasons.values())
    dataset = DATASETS["shards"].model_validate({"path": folder / "out"}).build()
    assert len(dataset) == prepared.num_samples
    for number in range(len(dataset)):
        for reference in dataset[number][1].images:
            load_image(reference.source).close()
    return Counter(good=prepared.num_samples, **prepared.reasons)


def fuzz_shards(folder: Path, chance: random.Random, count: int) -> Counter[str]:
    """Damage the shards of a folder; a sample is read, or an error of ours says why not."""
    files = sorted([*(folder / "out").glob("*.tar"), *(folder / "out").glob("*.idx")])
    contents = {path: path.read_bytes() for path in files}
    found: Counter[str] = Counter()
    for _ in range(count):
        path = chance.choice(files)
        path.write_bytes(damage_bytes(contents[path], chance))
        try:
            dataset = DATASETS["shards"].model_validate({"path": folder / "out", "bad_rows": "skip"}).build()
        except ValueError:
            found["folder refused"] += 1
            dataset = None
        for number in range(len(dataset) if dataset is not None else 0):
            try:
                for reference in dataset[number][1].images:
                    load_image(reference.source).close()
                found["sample read"] += 1
            except ValueError as error:
                found["sample refused" if "shard-" in str(error) else f"refused without a place: {error}"] += 1
            except ImageError:
                found["image refused"] += 1
        path.write_bytes(contents[path])
    return found


def fuzz(count: int, seed: int) -> Counter[str]:
    """Run over about so many damaged inputs.

    Returns:
        What became of them.
    """
    chance = random.Random(seed)
    found: Counter[str] = Counter()
    num_done = 0
    while num_done < count:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            found += fuzz_source(Path(name), chance, ROWS_AT_ONCE)
            found += fuzz_shards(Path(name), chance, ROWS_AT_ONCE // 4)
        num_done += ROWS_AT_ONCE + ROWS_AT_ONCE // 4
        seconds = time.monotonic() - started
        assert seconds < MOST_SECONDS, f"a batch took {seconds:.0f} s"
    found["inputs"] = num_done
    return found


if __name__ == "__main__":
    for what, how_often in sorted(fuzz(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0).items()):
        print(f"{what}: {how_often}")
