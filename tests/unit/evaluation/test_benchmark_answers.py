"""Answers are kept as they come: an interrupted evaluation goes on, and one with other settings is refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_examples import EXAMPLES

from megavlm.batch import SkippedSample
from megavlm.data import SampleError
from megavlm.evaluation import answering
from megavlm.evaluation.answer import AnswerFile
from megavlm.evaluation.answering import AnswerSettings
from megavlm.evaluation.benchmarks.load import load_benchmark
from megavlm.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from megavlm.evaluation.metrics import ANLS, VQAAccuracy
from megavlm.evaluation.plan import EvaluationPlan
from megavlm.evaluation.question import QuestionSet
from megavlm.evaluation.score import check_metric
from megavlm.evaluation.table import print_answers, print_score, write_markdown

NUM_QUESTIONS = 11
SETTINGS = {"checkpoint": {"name": "iter_0000012"}, "data": "val.json", "max_new_tokens": 8, "prompt_suffix": ""}


class Processor:
    """Makes prompts of questions; some have an image that is missing."""

    missing: tuple[str, ...] = ()

    def prompt(self, key: str, _: object) -> Any:
        if key in self.missing:
            raise SampleError(SkippedSample(key, "image_missing", f"image={key}.png: no such file."))
        sample = SimpleNamespace(
            key=key, num_tokens=int(key) % 4, tiles=torch.zeros(1 + int(key) % 3, 1), num_degraded=0
        )
        return SimpleNamespace(sample=sample)


class Model:
    """Answers with the question's name, and can be interrupted."""

    def __init__(self, stops_at: int = 1000) -> None:
        self.batches: list[list[str]] = []
        self.stops_at = stops_at

    def generate(self, _: object, samples: Sequence[Any], *, max_new_tokens: int) -> list[list[int]]:
        if len(self.batches) == self.stops_at:
            raise KeyboardInterrupt
        self.batches.append([sample.key for sample in samples])
        return [[int(sample.key)] for sample in samples]

    @property
    def asked(self) -> list[str]:
        return sorted((key for batch in self.batches for key in batch), key=int)


@pytest.fixture
def parts() -> Any:
    engine = SimpleNamespace(data_parallel_size=1, data_parallel_rank=0, gather_over_replicas=lambda item: [item])
    tokenizer = SimpleNamespace(decode=lambda ids: f"answer {ids[0]}")
    return SimpleNamespace(engine=engine, tokenizer=tokenizer, processor=Processor(), recipe=None)


@pytest.fixture
def plan(tmp_path: Path) -> EvaluationPlan:
    """Questions 0 to 10; every third has another truth than the model's answer."""
    data = {
        "data": [
            {"questionId": number, "question": "?", "image": f"{number}.png", "answers": [f"answer {number}"]}
            for number in range(NUM_QUESTIONS)
        ]
    }
    for number in range(0, NUM_QUESTIONS, 3):
        data["data"][number]["answers"] = ["nothing of the kind"]
    questions = load_benchmark("docvqa", replace(EXAMPLES["docvqa"], data=data).write(tmp_path))
    output = tmp_path / "output"
    answer_file = AnswerFile(output / "answers.jsonl", SETTINGS)
    settings = AnswerSettings(8, batch_size=2)
    return EvaluationPlan(questions, NUM_QUESTIONS, ANLS(), settings, SETTINGS, output, False, answer_file)


def run(parts: Any, plan: EvaluationPlan, monkeypatch: pytest.MonkeyPatch, model: Model) -> Evaluation:
    monkeypatch.setattr(answering, "generate", model.generate)
    evaluation = evaluate(parts, plan)
    write_evaluation(plan.output, evaluation)
    return evaluation


def test_an_interrupted_evaluation_goes_on(
    parts: Any, plan: EvaluationPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(plan, output=tmp_path / "whole", answer_file=AnswerFile(tmp_path / "whole/answers.jsonl", SETTINGS))
    reference = run(parts, whole, monkeypatch, Model())
    first = Model(stops_at=2)
    with pytest.raises(KeyboardInterrupt):
        run(parts, plan, monkeypatch, first)
    assert len(first.asked) == 4
    with (plan.output / "answers.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"number": 9, "ke')  # killed while writing
    second = Model()
    run(parts, plan, monkeypatch, second)
    assert sorted(first.asked + second.asked, key=int) == [str(number) for number in range(NUM_QUESTIONS)]
    written = (plan.output / "evaluation.json").read_bytes()
    assert written == (tmp_path / "whole/evaluation.json").read_bytes()
    third = Model()
    run(parts, plan, monkeypatch, third)
    assert third.batches == []
    assert (plan.output / "evaluation.json").read_bytes() == written
    assert reference.score.value == pytest.approx(7 / 11)  # 0, 3, 6 and 9 are wrong


def test_any_batch_size_gives_the_same(
    parts: Any, plan: EvaluationPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for batch_size in (1, 3, 32):
        model = Model()
        own = replace(plan, answering=AnswerSettings(8, batch_size), answer_file=None)
        results.append(run(parts, own, monkeypatch, model))
        lengths = [[int(key) % 4 for key in batch] for batch in model.batches]
        assert all(batch == sorted(batch, reverse=True) for batch in lengths)
        assert max(map(len, lengths)) == min(batch_size, NUM_QUESTIONS)
    assert results[0] == results[1] == results[2]
    assert [answer.key for answer in results[0].answers] == [str(number) for number in range(NUM_QUESTIONS)]
    assert results[0].score.by_num_tiles == {1: (0.0, 4), 2: (1.0, 4), 3: (1.0, 3)}


def test_what_cannot_be_asked_counts_as_wrong_and_is_asked_again(
    parts: Any,
    plan: EvaluationPlan,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts.processor.missing = ("1", "2")
    evaluation = run(parts, plan, monkeypatch, Model())
    assert (evaluation.score.num_questions, evaluation.score.num_unusable) == (11, 2)
    assert evaluation.score.value == pytest.approx(5 / 11)
    content = json.loads((plan.output / "evaluation.json").read_text())
    assert [row["key"] for row in content["unusable"]] == ["1", "2"]
    assert "1.png: no such file" in content["unusable"][0]["problem"]
    print_score(evaluation)
    print_answers(evaluation.answers, most=3)
    assert "counted as wrong" in capsys.readouterr().out
    assert "image=1.png: no such file" in write_markdown(plan.output, evaluation).read_text()
    parts.processor.missing = ()
    model = Model()
    assert run(parts, plan, monkeypatch, model).score.num_unusable == 0
    assert model.asked == ["1", "2"]
    parts.processor.missing = tuple(map(str, range(NUM_QUESTIONS)))
    with pytest.raises(ValueError, match=r"none of its 11 questions can be asked; .*image_missing"):
        run(parts, replace(plan, answer_file=None), monkeypatch, Model())


def test_other_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    file = AnswerFile(path, SETTINGS)
    assert file.open() == {}
    file.close()
    other = {**SETTINGS, "checkpoint": {"name": "iter_0000024"}}
    with pytest.raises(ValueError, match=r"checkpoint.name was 'iter_0000012' and is 'iter_0000024' now"):
        AnswerFile(path, other).open()
    with pytest.raises(ValueError, match="split was 'nothing' and is 'val' now"):
        AnswerFile(path, {**SETTINGS, "split": "val"}).open()
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"answers.jsonl:2: is no answer"):
        AnswerFile(path, SETTINGS).open()
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"answers.jsonl:1: is no answer"):
        AnswerFile(path, SETTINGS).open()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        AnswerFile(tmp_path / "file/answers.jsonl", SETTINGS).open()


def test_brackets_and_dollars_in_answers_are_text(
    parts: Any, plan: EvaluationPlan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts.tokenizer.decode = lambda ids: "[/b] $5 [red]"
    print_answers(run(parts, plan, monkeypatch, Model()).answers, most=1)
    assert "[/b] $5 [red]" in capsys.readouterr().out


def test_a_metric_that_cannot_score_the_questions_is_refused_before_they_are_asked(plan: EvaluationPlan) -> None:
    with pytest.raises(ValueError, match="VQA accuracy needs the answers of at least 4 people"):
        check_metric(plan.questions.questions, VQAAccuracy())
    no_truth = replace(plan.questions.questions[0], references=("",))
    with pytest.raises(ValueError, match="none of these 1 says anything"):
        check_metric(QuestionSet("one", [no_truth]).questions, ANLS())
