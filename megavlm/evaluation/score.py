"""Scores answers: the metric's value, and the same by category and by number of tiles."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megavlm.evaluation.answer import Answer
from megavlm.evaluation.metrics import Metric
from megavlm.evaluation.question import Question, QuestionSet

K = TypeVar("K", str, int)


@dataclass(frozen=True)
class ScoredAnswer:
    """One question with all that is known of it."""

    key: str
    question: str
    references: tuple[str, ...]
    choices: tuple[str, ...]
    category: str
    images: list[str]
    """Where the question's images are."""
    answer: str
    answer_to_blank: str | None
    """What the model says when every tile is black; None where that was not asked."""
    num_tiles: int | None
    """None where the question could not be asked."""
    problem: str
    """Why it could not be asked; else empty."""
    score: float
    is_right: bool
    """Whether the score is the metric's highest."""


@dataclass(frozen=True)
class Score:
    """What the answers came to."""

    value: float
    """Of the metric, over all questions; one that could not be asked scores 0."""
    num_questions: int
    num_unusable: int
    """Questions that could not be asked (image missing or unreadable, prompt too long); wrong in every figure."""
    num_left_out: int
    """Rows that are no questions for this evaluation; in no figure."""
    num_unparsed: int
    """Answers to multiple choice questions that name no option; wrong."""
    num_cut: int
    """Answers that were still going on at the most tokens."""
    num_degraded: int
    """Images that got fewer tiles than the tiling chose, so that the prompt fits."""
    by_category: dict[str, tuple[float, int]]
    """Category -> mean score and number of questions; empty where there are no categories."""
    by_num_tiles: dict[int, tuple[float, int]]
    """Tiles of a question -> mean score and number of questions; without those that could not be asked."""


def check_metric(questions: Sequence[Question], metric: Metric) -> None:
    """Make sure, before anything is generated, that the metric can score these questions.

    Raises:
        ValueError: a question lacks what the metric needs, or there are too few.
    """
    metric.score([question.item("") for question in questions])


def score_answers(
    asked: QuestionSet, answers: Sequence[Answer], metric: Metric
) -> tuple[Score, tuple[ScoredAnswer, ...]]:
    """Score the answers to the first questions of a set.

    Args:
        asked: the questions.
        answers: of the first so many, in order.
        metric: scores them.

    Raises:
        ValueError: a question lacks what the metric needs, or there are too few.
    """
    questions = [asked.questions[answer.number] for answer in answers]
    result = metric.score([question.item(answer.text) for question, answer in zip(questions, answers, strict=True)])
    scored = tuple(
        ScoredAnswer(
            question.key,
            question.text,
            question.references,
            question.choices,
            question.category,
            question.images,
            answer.text,
            answer.text_without_image,
            answer.num_tiles,
            answer.problem,
            points,
            points == metric.highest,
        )
        for question, answer, points in zip(questions, answers, result.per_item, strict=True)
    )
    score = Score(
        value=result.value,
        num_questions=len(scored),
        num_unusable=sum(bool(answer.problem) for answer in answers),
        num_left_out=len(asked.left_out),
        num_unparsed=result.num_unparsed,
        num_cut=sum(answer.is_cut for answer in answers),
        num_degraded=sum(answer.num_degraded for answer in answers),
        by_category=_means((one.category, one.score) for one in scored if one.category),
        by_num_tiles=_means((one.num_tiles, one.score) for one in scored if one.num_tiles is not None),
    )
    return score, scored


def _means(scores: Iterable[tuple[K, float]]) -> dict[K, tuple[float, int]]:
    groups: dict[K, list[float]] = defaultdict(list)
    for group, score in scores:
        groups[group].append(score)
    return {group: (math.fsum(values) / len(values), len(values)) for group, values in sorted(groups.items())}
