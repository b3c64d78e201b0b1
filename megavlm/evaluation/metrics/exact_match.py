"""Exact match: the answer equals a reference after trimming blanks at both ends. Case and punctuation count.

Source: EM of SQuAD (arXiv 1606.05250) without its normalisation; ``exact_match`` of pix2struct (pix2struct/metrics.py)
is the same without the trimming. SQuAD's own script also drops case, punctuation and articles: for that use
``gqa_accuracy`` (case and punctuation) or ``vqa_accuracy``.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from megavlm.config import Config
from megavlm.evaluation.metrics.item import Item, MetricResult, average_of_best


class ExactMatch(Config):
    """1 where the trimmed prediction equals a trimmed reference, else 0."""

    kind: Literal["exact_match"] = "exact_match"
    highest: ClassVar[float] = 1.0

    def score(self, items: Sequence[Item]) -> MetricResult:
        """Score all items of all ranks.

        Raises:
            ValueError: there are no items.
        """
        return average_of_best(items, lambda prediction, reference: float(prediction.strip() == reference.strip()))
