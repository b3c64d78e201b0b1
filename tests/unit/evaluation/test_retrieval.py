"""Recall of images and captions, against tables small enough to read."""

import json
from pathlib import Path

import pytest
import torch

from megavlm.evaluation.retrieval import judge, print_retrieval, write_retrieval

SCORES = torch.tensor(
    [
        [0.9, 0.1, 0.2, 0.3],
        [0.8, 0.5, 0.7, 0.6],
        [0.1, 0.2, 0.3, 0.4],
        [0.4, 0.3, 0.2, 0.1],
    ]
)


def test_recalls_by_hand() -> None:
    found = judge(SCORES.repeat(1, 1), ["a", "b", "c", "d"])
    # image 0 finds its caption first; 1 fourth; 2 second; 3 fourth. Caption 0 finds image 0; 1: image 1; 2: image 1
    # before 2; 3: image 1 first, its own last
    assert found.image_to_text == {1: 0.25}
    assert found.text_to_image == {1: 0.5}
    assert found.by_chance == {1: 0.25}
    assert (found.num_pairs, found.num_captions) == (4, 4)


def test_the_fifth_counts_at_five() -> None:
    size = 10
    # caption n + 4 is found before n, n + 3 ... too: each is the fifth of its image
    scores = torch.stack([torch.arange(size, dtype=torch.float32).roll(5 + row) for row in range(size)])
    assert scores.argsort(dim=1, descending=True)[0].tolist()[4] == 0
    found = judge(scores, [str(number) for number in range(size)])
    assert found.image_to_text == {1: 0.0, 5: 1.0, 10: 1.0}
    assert found.by_chance == {1: pytest.approx(0.1), 5: pytest.approx(0.5), 10: 1.0}


def test_equal_captions_are_one() -> None:
    """Image 2 finds the caption of image 3, which says the same; and that caption finds image 1 first, not its own."""
    found = judge(SCORES, ["a", "b", "c", "c"])
    assert found.image_to_text == {1: 0.5}
    assert found.text_to_image == {1: 0.5}
    assert found.num_captions == 3
    # two of four are right for two of the pairs
    assert found.by_chance == {1: pytest.approx(0.25 * (0.25 + 0.25 + 0.5 + 0.5))}


def test_what_is_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = judge(torch.eye(6), [str(number) for number in range(6)], (("rows.jsonl:3", "not_a_pair: has 0 tiles"),))
    print_retrieval(found)
    printed = capsys.readouterr().out
    assert "6 held-out pairs" in printed
    assert "100.00" in printed
    assert "1 rows are no pairs" in printed
    content = json.loads(write_retrieval(tmp_path / "new", found, {"checkpoint": "x"}).read_text(encoding="utf-8"))
    assert content["score"]["image_to_text"] == {"1": 1.0, "5": 1.0}
    assert content["settings"] == {"checkpoint": "x"}
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--output=.*file: cannot be written"):
        write_retrieval(tmp_path / "file", found, {})
