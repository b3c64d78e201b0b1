"""Runs an evaluation: asks what is not yet answered, keeps the answers as they come, scores them all."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from megavlm.build import Parts
from megavlm.checkpoint import durable
from megavlm.checkpoint.agreement import from_rank_0, rank
from megavlm.config import Config
from megavlm.evaluation.answer import Answer
from megavlm.evaluation.answering import answer_questions
from megavlm.evaluation.held_out import baselines
from megavlm.evaluation.plan import EvaluationPlan
from megavlm.evaluation.question import LeftOut
from megavlm.evaluation.score import Score, ScoredAnswer, score_answers
from megavlm.runtime.log import LOGGER

_NUM_LISTED = 5
_SHOWN_SOURCE = 200


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    name: str
    settings: Mapping[str, Any]
    """What the answers depend on."""
    metric: Mapping[str, Any]
    """Kind and options of the metric."""
    score: Score
    baselines: Mapping[str, float]
    """Scores of answers that do not look at the image; empty for benchmarks."""
    answers: tuple[ScoredAnswer, ...]
    left_out: tuple[LeftOut, ...]


def evaluate(parts: Parts, plan: EvaluationPlan) -> Evaluation:
    """Answer and score. Collective: all ranks call it, and all get the same result, whatever their number.

    Args:
        parts: with a wrapped model.
        plan: what to do.

    Raises:
        ValueError: the output cannot be written or holds answers with other settings, or no question can be asked.
    """
    answers = _answers(parts, plan)
    unusable = [answer for answer in answers if answer.problem]
    for answer in unusable[:_NUM_LISTED]:
        LOGGER.warning("cannot be asked, counts as wrong: %s: %s", answer.key, answer.problem)
    if len(unusable) == len(answers):
        raise ValueError(
            f"{plan.questions.name}: none of its {len(answers)} questions can be asked; the first, {answers[0].key}: "
            f"{answers[0].problem}"
        )
    assert isinstance(plan.metric, Config)
    score, scored = score_answers(plan.questions, answers, plan.metric)
    questions = plan.questions.questions[: plan.limit]
    return Evaluation(
        plan.questions.name,
        plan.settings,
        plan.metric.model_dump(),
        score,
        baselines(parts.recipe, questions, answers, plan.metric) if plan.is_held_out else {},
        scored,
        plan.questions.left_out,
    )


def write_evaluation(folder: Path, evaluation: Evaluation) -> Path:
    """Write ``evaluation.json``: settings, metric, score, every answer, and what could not be asked.

    Raises:
        ValueError: the folder cannot be written.
    """
    score = {**asdict(evaluation.score), **evaluation.baselines}
    if evaluation.baselines:
        score["exact_match"] = evaluation.score.value
    content = {
        "name": evaluation.name,
        "metric": evaluation.metric,
        "score": score,
        "unusable": [{"key": one.key, "problem": one.problem} for one in evaluation.answers if one.problem],
        "left_out": [asdict(row) for row in evaluation.left_out],
        "settings": evaluation.settings,
        "answers": [asdict(one) | {"images": [_shown(source) for source in one.images]} for one in evaluation.answers],
    }
    path = folder / "evaluation.json"
    try:
        durable.replace_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise ValueError(f"--output={folder}: cannot be written ({error}). Choose another.") from None
    return path


def _answers(parts: Parts, plan: EvaluationPlan) -> list[Answer]:
    """All answers in order; those of an interrupted evaluation are taken over."""
    is_writer = rank() == 0
    file = plan.answer_file
    answers: dict[int, Answer] = {} if file is None else from_rank_0(f"opening {file.path}", file.open)
    answers = {number: answer for number, answer in answers.items() if number < plan.limit}
    if answers:
        LOGGER.info("%d of %d questions are answered already", len(answers), plan.limit)
    numbers = [number for number in range(plan.limit) if number not in answers]
    try:
        with Progress(disable=not (is_writer and sys.stdout.isatty())) as progress:
            task = progress.add_task("answering", total=plan.limit, completed=len(answers))
            for came in answer_questions(parts, plan.questions.questions, numbers, plan.answering):
                if file is not None and is_writer:
                    file.add(came)
                answers |= {answer.number: answer for answer in came}
                progress.update(task, completed=len(answers))
    finally:
        if file is not None and is_writer:
            file.close()
    return [answers[number] for number in range(plan.limit)]


def _shown(source: str) -> str:
    """A path, or the beginning of an image that is written into the row."""
    return source if not source.startswith("data:") else f"{source[:_SHOWN_SOURCE]}..."
