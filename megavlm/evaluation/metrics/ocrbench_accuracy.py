"""OCRBench accuracy: the reference occurs somewhere in the answer.

Source: OCRBench (arXiv 2305.07895), Yuliang-Liu/MultimodalOCR, OCRBench/example.py, which is followed: both sides are
trimmed and lower-cased and their newlines become blanks; for handwritten formulas (HME100k) all blanks are removed
instead, and case counts. One reference that occurs is enough. No word boundaries are asked for: "12" occurs in "312".

Where copies differ from it:

- lmms-eval (lmms_eval/tasks/ocrbench/utils.py) lower-cases the prediction of formulas but not the reference, so that
  a formula with a capital letter is never right.
- Megatron-LM (examples/multimodal/evaluation/evaluate_ocrbench.py) adds one for *each* reference that occurs, so that
  a question can count more than once.

The benchmark's headline is the number of right answers among its 1,000 questions: ``value`` times 1,000.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from megavlm.config import Config
from megavlm.evaluation.metrics.item import Item, MetricResult, average

FORMULA_CATEGORIES = ("HME100k", "Handwritten Mathematical Expression Recognition")
"""Values of :attr:`Item.category` scored as formulas: ``dataset_name`` and ``type`` of the same OCRBench questions."""


class OCRBenchAccuracy(Config):
    """1 where a reference occurs in the prediction, else 0."""

    kind: Literal["ocrbench_accuracy"] = "ocrbench_accuracy"
    highest: ClassVar[float] = 1.0

    def score(self, items: Sequence[Item]) -> MetricResult:
        """Score all items of all ranks; :attr:`Item.category` says which are formulas.

        Raises:
            ValueError: there are no items.
        """
        return average([_contains_reference(item) for item in items])


def _contains_reference(item: Item) -> float:
    normalize = _normalize_formula if item.category in FORMULA_CATEGORIES else _normalize_text
    said = normalize(item.prediction)
    # a blank reference occurs in every answer
    truths = [normalize(reference) for reference in item.references if reference.strip()]
    return float(any(truth in said for truth in truths))


def _normalize_text(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _normalize_formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
