"""Scores of an evaluation, and the picture of its answers."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megavlm.data.tilings import DynamicTilingConfig
from megavlm.evaluation.exact_match import Answer, _score, write_results
from megavlm.evaluation.picture import draw_samples
from megavlm.evaluation.table import print_answers, print_score


def answer(key: str, said: str, blank: str, truth: str, tiles: int = 3, images: tuple[str, ...] = ()) -> Answer:
    return Answer(key, f"question {truth[:1]}", truth, said, blank, list(images), tiles)


ANSWERS = [
    answer("1", "12", "40", "12"),
    answer("2", " 13\n", "13", "13", tiles=7),
    answer("3", "21", "13", "22", tiles=7),
    answer("4", "2", "", "2 2", tiles=1),
]


def test_scores() -> None:
    score = _score(ANSWERS, {"question 1": "13", "question 2": "22"}, num_unusable=2)
    assert (score.exact_match, score.blank_images, score.most_frequent_answer) == (0.5, 0.25, 0.5)
    assert score.by_num_tiles == {1: (0.0, 1), 3: (1.0, 1), 7: (0.5, 2)}
    assert (score.num_questions, score.num_unusable) == (4, 2)


def test_results_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = _score(ANSWERS, {}, num_unusable=2)
    content = json.loads(write_results(tmp_path, score, ANSWERS).read_text())
    assert content["score"]["exact_match"] == 0.5
    assert [entry["right"] for entry in content["answers"]] == [True, True, False, False]
    print_answers(ANSWERS, most=2)
    print_score(score)
    printed = capsys.readouterr().out
    assert "50.0%" in printed
    assert "rows that gave no question" in printed


class Tiled:
    """What the picture asks of a sample processor."""

    class config:  # noqa: N801
        max_image_pixels = 10**6

    tiling = DynamicTilingConfig().build(32)


def test_picture_of_answers(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    Image.new("RGB", (96, 64), "white").save(path)
    drawn = [answer(str(n), "1", "", "1" if n % 2 else "2", images=(str(path),)) for n in range(5)]
    draw_samples(tmp_path / "samples.png", drawn, Tiled())
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width > 600
    draw_samples(tmp_path / "none.png", [answer("1", "1", "", "1")], Tiled())
    assert not (tmp_path / "none.png").exists()
