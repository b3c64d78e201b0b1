"""The metrics: predictions and references to scores. One file per metric, and the dict of metrics.

A metric is a config class (its fields are its options) with ``score``, which takes *all* items, gathered from all
ranks: its result depends neither on their order nor on how ranks shared them, but a question given twice counts twice.
Each file names the definition it follows and where published implementations differ from it. This package imports
nothing of the project but ``megavlm.config``.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Protocol

import pydantic

from megavlm.evaluation.metrics.anls import ANLS
from megavlm.evaluation.metrics.cider import CIDEr
from megavlm.evaluation.metrics.exact_match import ExactMatch
from megavlm.evaluation.metrics.gqa_accuracy import GQAAccuracy
from megavlm.evaluation.metrics.item import Item, MetricResult
from megavlm.evaluation.metrics.mmmu_accuracy import MMMUAccuracy
from megavlm.evaluation.metrics.multiple_choice import MultipleChoice
from megavlm.evaluation.metrics.ocrbench_accuracy import OCRBenchAccuracy
from megavlm.evaluation.metrics.relaxed_accuracy import RelaxedAccuracy
from megavlm.evaluation.metrics.textvqa_accuracy import TextVQAAccuracy
from megavlm.evaluation.metrics.vqa_accuracy import VQAAccuracy


class Metric(Protocol):
    """What every metric offers."""

    highest: ClassVar[float]
    """Score of a perfect answer; the lowest is 0."""

    @property
    def kind(self) -> str:
        """Its name in recipes, the key of :data:`METRICS`."""

    def score(self, items: Sequence[Item]) -> MetricResult:
        """Score all items of all ranks.

        Raises:
            ValueError: there are too few items, or one lacks what the metric needs.
        """


METRICS: dict[str, type[Metric]] = {
    "anls": ANLS,
    "cider": CIDEr,
    "exact_match": ExactMatch,
    "gqa_accuracy": GQAAccuracy,
    "mmmu_accuracy": MMMUAccuracy,
    "multiple_choice": MultipleChoice,
    "ocrbench_accuracy": OCRBenchAccuracy,
    "relaxed_accuracy": RelaxedAccuracy,
    "textvqa_accuracy": TextVQAAccuracy,
    "vqa_accuracy": VQAAccuracy,
}

MetricConfig = Annotated[
    ANLS
    | CIDEr
    | ExactMatch
    | GQAAccuracy
    | MMMUAccuracy
    | MultipleChoice
    | OCRBenchAccuracy
    | RelaxedAccuracy
    | TextVQAAccuracy
    | VQAAccuracy,
    pydantic.Field(discriminator="kind"),
]

__all__ = [
    "ANLS",
    "METRICS",
    "CIDEr",
    "ExactMatch",
    "GQAAccuracy",
    "Item",
    "MMMUAccuracy",
    "Metric",
    "MetricConfig",
    "MetricResult",
    "MultipleChoice",
    "OCRBenchAccuracy",
    "RelaxedAccuracy",
    "TextVQAAccuracy",
    "VQAAccuracy",
]
