"""What a metric reads and what it gives: :class:`Item`, :class:`MetricResult` and the mean over items."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One answered question. Checked when made, so that no metric meets a question without references.

    Raises:
        ValueError: ``references`` or ``choices`` is one string, or no reference says anything.
    """

    key: str
    """Names the question in errors."""
    prediction: str
    """What the model said. A blank one scores 0 in every metric."""
    references: Sequence[str]
    """The right answers; several where people were asked (VQAv2: ten) or several spellings are right. A blank one
    among others is never matched, but counts as an answer given where answers are counted."""
    choices: Sequence[str] = ()
    """Texts of the options A, B, C, ... of a multiple choice question."""
    category: str = ""
    """Kind of the question, as its benchmark names it. OCRBench scores formulas in another way."""

    def __post_init__(self) -> None:
        for name in ("references", "choices"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise ValueError(
                    f"{self.key}: {name}={given!r}: one string would be read letter by letter. Give a list of strings."
                )
        if not any(reference.strip() for reference in self.references):
            raise ValueError(
                f"{self.key}: references={list(self.references)}: none of these {len(self.references)} says anything. "
                "Leave the question out, or take a split whose answers are public."
            )

    @property
    def is_blank(self) -> bool:
        """Whether the model said nothing."""
        return not self.prediction.strip()


@dataclass(frozen=True)
class MetricResult:
    """Score of a set of items."""

    per_item: tuple[float, ...]
    """Score of each item, in the order given: from 0 to the metric's ``highest``."""
    value: float
    """Mean of ``per_item``; the same in any order of the items, to the last bit."""
    num_unparsed: int = 0
    """Items whose prediction names no option (multiple choice); they score 0."""


def average(scores: Sequence[float], *, num_unparsed: int = 0) -> MetricResult:
    """Put scores of items and their mean together.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError(
            "items=[]: the mean of 0 items has no value, at least 1 is needed. Give the answered questions."
        )
    # fsum rounds once, at the end: a plain sum depends on the order, and so on how ranks shared the questions
    return MetricResult(tuple(scores), math.fsum(scores) / len(scores), num_unparsed)


def average_of_best(items: Sequence[Item], compare: Callable[[str, str], float]) -> MetricResult:
    """Score each item by the reference that suits it best.

    Args:
        items: all items of all ranks.
        compare: takes a prediction that is not blank and one reference, and gives their score.
    """
    return average(
        [
            0.0 if item.is_blank else max(compare(item.prediction, reference) for reference in item.references)
            for item in items
        ]
    )
