"""``megavlm eval --benchmark`` as a person runs it: any number of ranks, interrupted and resumed."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megavlm.cli import main

Run = Callable[..., subprocess.CompletedProcess[str]]

NUM_QUESTIONS = 9
LONG = 200.0
"""Seconds that two ranks may take on a busy machine, most of them for starting."""


@pytest.fixture
def trained(megavlm: Run, recipe: Path, tmp_path: Path) -> Path:
    """The run folder of a model."""
    steps = ["training.train_iters=3", "training.optimizer.lr_warmup_iters=1", "checkpoint.save_interval=null"]
    result = megavlm("train", recipe, *steps)
    assert result.returncode == 0, result.stdout
    return tmp_path / "run"


@pytest.fixture
def questions(dataset: Path) -> Path:
    """A file in DocVQA's format over the images of the data set; one image is missing."""
    images = [*sorted(path.name for path in dataset.glob("*.png"))[: NUM_QUESTIONS - 1], "not_there.png"]
    data = [
        {"questionId": n, "question": f"what is number {n}", "image": name, "answers": [f"it is {n}", str(n)]}
        for n, name in enumerate(images)
    ]
    path = dataset / "docvqa.json"
    path.write_text(json.dumps({"data": data}), encoding="utf-8")
    return path


@pytest.mark.timeout(600)
def test_a_benchmark_gives_the_same_on_any_ranks_and_after_an_interruption(
    megavlm: Run, trained: Path, questions: Path, tmp_path: Path
) -> None:
    asked = ("eval", trained, "--benchmark", "docvqa", "--data", questions, "--max-new-tokens", 4, "--batch-size", 2)
    one = megavlm(*asked)
    assert one.returncode == 0, one.stdout
    folder = trained / "evaluation/docvqa/iter_0000003"
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["score"]["num_questions"] == len(found["answers"]) == NUM_QUESTIONS
    assert [row["key"] for row in found["unusable"]] == [str(NUM_QUESTIONS - 1)]
    assert "not_there.png" in one.stdout
    assert any(answer["answer"] for answer in found["answers"])
    assert "| model |" in (folder / "evaluation.md").read_text()

    # as a run of one rank that was killed leaves it: two answers and half a line; two ranks answer the rest
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed/answers.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    resumed = megavlm(*asked, "--nproc-per-node", 2, "--output", tmp_path / "resumed", timeout=LONG)
    assert resumed.returncode == 0, resumed.stdout
    assert "2 of 9 questions are answered already" in resumed.stdout
    assert json.loads((tmp_path / "resumed/evaluation.json").read_text()) == found

    for layout in ("tensor", "pipeline"):
        split = (f"engine.{layout}_model_parallel_size=2", "--nproc-per-node", 2, "--output", tmp_path / layout)
        result = megavlm(*asked, *split, timeout=LONG)
        assert result.returncode == 0, result.stdout
        assert json.loads((tmp_path / layout / "evaluation.json").read_text()) == found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data", "x.json"), "--data=x.json: belongs to --benchmark"),
        (("--benchmark", "docvqa", "--data", "x.json"), "x.json: cannot be read"),
        (("--limit", "0"), "--limit=0: must be at least 1"),
    ],
)
def test_wrong_options_are_one_error(
    recipe: Path, tmp_path: Path, options: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "run/iter_0000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "recipe.yaml").write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["eval", str(tmp_path / "run"), *options])
    assert str(caught.value.code).startswith("megavlm eval: error:")
    assert words in str(caught.value.code)
