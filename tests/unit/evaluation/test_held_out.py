"""The held-out data of a recipe, its blind baselines, and the picture of answers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from megavlm.data.datasets import JsonlDatasetConfig
from megavlm.data.tilings import DynamicTilingConfig
from megavlm.evaluation.answer import Answer
from megavlm.evaluation.evaluate import Evaluation, write_evaluation
from megavlm.evaluation.held_out import baselines, held_out_questions
from megavlm.evaluation.metrics import ExactMatch
from megavlm.evaluation.picture import draw_samples
from megavlm.evaluation.plan import EvaluationOptions, plan_evaluation
from megavlm.evaluation.score import ScoredAnswer, score_answers
from megavlm.evaluation.table import print_score

ROWS = [("first?", "12"), ("second?", "13"), ("second?", "22"), ("third?", "2 2")]
# with the image, without it, tiles
SAID = [("12", "40", 3), (" 13\n", "13", 7), ("21", "13", 7), ("2", "", 1)]
TRAINED = [("first?", "13"), ("second?", "22"), ("second?", "22"), ("second?", "13")]


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """What is asked of a recipe: training and validation data."""

    def write(name: str, rows: list[tuple[str, str]]) -> JsonlDatasetConfig:
        turns = [[{"from": "human", "value": question}, {"from": "gpt", "value": answer}] for question, answer in rows]
        (tmp_path / name).write_text("".join(json.dumps({"conversations": row}) + "\n" for row in turns))
        return JsonlDatasetConfig(path=tmp_path / name, bad_rows="skip")

    data = SimpleNamespace(valid=write("valid.jsonl", ROWS), train=write("train.jsonl", TRAINED))
    return SimpleNamespace(data=data)


@pytest.fixture
def answers() -> list[Answer]:
    return [Answer(n, str(n), said, blind, tiles) for n, (said, blind, tiles) in enumerate(SAID)]


def test_scores_and_baselines(
    recipe: Any, answers: list[Answer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with recipe.data.valid.path.open("a") as file:
        file.write("this is no row\n")
    asked = held_out_questions(recipe)
    assert [(question.text, *question.references) for question in asked.questions] == ROWS
    assert len(asked.left_out) == 1
    score, scored = score_answers(asked, answers, ExactMatch())
    assert score.value == 0.5
    assert score.by_num_tiles == {1: (0.0, 1), 3: (1.0, 1), 7: (0.5, 2)}
    assert (score.num_questions, score.num_unusable, score.num_left_out) == (4, 0, 1)
    blind = baselines(recipe, asked.questions, answers, ExactMatch())
    assert blind == {"blank_images": 0.25, "most_frequent_answer": 0.25}
    settings = {"checkpoint": {"name": "iter_0000001"}, "data": "valid.jsonl", "max_new_tokens": 4}
    evaluation = Evaluation(asked.name, settings, {"kind": "exact_match"}, score, blind, scored, asked.left_out)
    content = json.loads(write_evaluation(tmp_path, evaluation).read_text())
    assert {key: content["score"][key] for key in ("exact_match", *blind)} == {"exact_match": 0.5, **blind}
    assert content["score"]["by_num_tiles"] == {"1": [0.0, 1], "3": [1.0, 1], "7": [0.5, 2]}
    assert [entry["is_right"] for entry in content["answers"]] == [True, True, False, False]
    print_score(evaluation)
    printed = capsys.readouterr().out
    assert "most frequent answer to each question" in printed
    assert "50.00" in printed
    assert "row that cannot be used" in printed


def test_a_recipe_without_validation_data_is_refused(recipe: Any) -> None:
    recipe.data.valid = None
    with pytest.raises(ValueError, match=r"data\.valid=None: there is nothing to evaluate on"):
        held_out_questions(recipe)


def test_documents_are_left_out_and_counted(recipe: Any) -> None:
    for path in (recipe.data.valid.path, recipe.data.train.path):
        with path.open("a") as file:
            file.write(json.dumps({"text": "Nothing is asked here."}) + "\n")
    asked = held_out_questions(recipe)
    assert [(question.text, *question.references) for question in asked.questions] == ROWS
    assert [(Path(row.key).name, row.reason) for row in asked.left_out] == [
        ("valid.jsonl:5", "document, where nothing is asked")
    ]
    assert baselines(recipe, asked.questions, [Answer(n, str(n), "") for n in range(len(ROWS))], ExactMatch())


def test_documents_alone_are_refused(recipe: Any) -> None:
    recipe.data.valid.path.write_text(json.dumps({"text": "Nothing is asked here."}) + "\n")
    with pytest.raises(ValueError, match="all 1 usable rows are documents: none asks"):
        held_out_questions(recipe)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "--limit=0: must be at least 1"),
        ({"batch_size": 0}, "--batch-size=0: must be at least 1"),
        ({"max_new_tokens": -1}, "--max-new-tokens=-1: must be at least 1"),
        ({"prompt_suffix": "Be brief."}, r"--prompt-suffix=Be brief\.: belongs to --benchmark"),
        ({"metric": "anls"}, "--metric=anls: belongs to --benchmark"),
        ({"benchmark": "docvqa"}, "--benchmark=docvqa: needs --data"),
        ({"benchmark": "docvqa", "data": Path("a"), "images": Path("/not/there")}, "--images=/not/there: is no folder"),
    ],
)
def test_options_that_do_not_go_together_are_refused(recipe: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_evaluation(EvaluationOptions(**options), Path("run/iter_0000001"), recipe)


class Tiled:
    """What the picture asks of a sample processor."""

    class config:  # noqa: N801
        max_image_pixels = 10**6

    tiling = DynamicTilingConfig().build(32)


def drawn(key: str, truth: str, images: list[str], problem: str = "") -> ScoredAnswer:
    question = "costs $5, $6_or_$7?"  # no formula
    return ScoredAnswer(
        key,
        question,
        (truth,),
        (),
        "",
        images,
        "1",
        None,
        None if problem else 3,
        problem,
        float(truth == "1"),
        truth == "1",
    )


def test_picture_of_answers(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    Image.new("RGB", (96, 64), "white").save(path)
    answers = [drawn(str(n), "1" if n % 2 else "2", [str(path)]) for n in range(5)]
    answers.append(drawn("missing", "1", ["/not/there.png"], "image_missing"))
    draw_samples(tmp_path / "samples.png", answers, Tiled())
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width > 600
    draw_samples(tmp_path / "none.png", [drawn("text", "1", [])], Tiled())
    assert not (tmp_path / "none.png").exists()
