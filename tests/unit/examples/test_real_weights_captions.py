"""The captions of the real-weights example: files that belong together, examples that nobody chose, a small picture."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[3] / "examples" / "real_weights"

sys.path.insert(0, str(FOLDER))  # as Python does where the script is run
captions = importlib.import_module("captions")
sys.path.remove(str(FOLDER))

NAMES = ["red heart", "a $5 note", "caf\u00e9"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Held-out rows, answers before, answers after."""
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(len(NAMES)):
        pixels = random.integers(0, 256, (256, 256, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number}.webp")
    rows = [
        {"image": f"images/{number}.webp", "conversations": [{"from": "human", "value": "<image>"}, {"value": name}]}
        for number, name in enumerate(NAMES)
    ]
    answers = [
        write(tmp_path / f"{run}.jsonl", [{"reference": name, "answer": f" {run} {name}\n"} for name in NAMES])
        for run in ("before", "after")
    ]
    return write(tmp_path / "valid.jsonl", rows), answers[0], answers[1]


def test_rows_meet_their_answers(files: tuple[Path, Path, Path]) -> None:
    examples = captions.read_examples(*files)
    assert [(example.name, example.before, example.after) for example in examples] == [
        (name, f"before {name}", f"after {name}") for name in NAMES
    ]
    assert all(example.image.is_file() for example in examples)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda rows: rows[:-1],
            r"after\.jsonl: has 2 answers, and .*valid\.jsonl has 3 rows\. Answer that file again",
        ),
        (
            lambda rows: [rows[1], rows[0], rows[2]],
            r"after\.jsonl:1: answers 'a \$5 note', and .* has 'red heart' there",
        ),
        (lambda rows: [{"error": "image is missing"}, *rows[1:]], r"after\.jsonl:1: answers None, and .*'red heart'"),
    ],
)
def test_files_of_another_run_are_refused(files: tuple[Path, Path, Path], spoil: Any, message: str) -> None:
    rows = [json.loads(line) for line in files[2].read_text(encoding="utf-8").splitlines()]
    write(files[2], spoil(rows))
    with pytest.raises(ValueError, match=message):
        captions.read_examples(*files)


@pytest.mark.parametrize(("count", "most", "chosen"), [(200, 4, [0, 50, 100, 150]), (3, 12, [0, 1, 2]), (5, 2, [0, 2])])
def test_examples_are_spread_evenly(count: int, most: int, chosen: list[int]) -> None:
    assert captions.spread(range(count), most) == chosen


def test_the_picture_stays_small(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    examples = captions.read_examples(*files) * 4  # noise compresses worst
    captions.draw(tmp_path / "captions.png", examples)
    assert (tmp_path / "captions.png").stat().st_size < 600_000
    with Image.open(tmp_path / "captions.png") as picture:
        assert picture.mode == "P"
        assert picture.width > picture.height


def test_a_run_without_checkpoint_is_one_line(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, *answers = map(str, files)
    missing = [str(tmp_path / "none"), str(tmp_path / "none")]
    options = ["--runs", *missing, "--answers", *answers, "--rows", rows, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"captions: error: .*none"):
        captions.main(options)
