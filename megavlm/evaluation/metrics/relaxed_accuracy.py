"""Relaxed accuracy: numbers within 5 % of the reference, other answers equal to it. For charts.

Source: ChartQA (arXiv 2203.10244, section 5.1, after Methani et al., arXiv 1909.00997). The authors published no
script; ``relaxed_correctness`` of pix2struct (pix2struct/metrics.py) became the standard and is copied by Qwen-VL,
lmms-eval and VLMEvalKit. It is followed here: an answer is a number if all of it reads as one, "5%" is 0.05, the
deviation is divided by the reference's absolute value, text is compared without case. Years are numbers too, so 2008
is right for 2010 (google-research/pix2struct issue 35): part of the published figures, and kept.

Differences from it, all in the direction of the paper's definition:

- Thousands commas belong to the number ("1,000"); pix2struct compares such answers as text. Megatron-LM and
  mistral-evals drop commas as well. ``thousands_commas=False`` turns this off.
- A reference of zero is compared as a number, so that "0.0" is right for "0"; pix2struct compares text.
- Arithmetic is decimal: 0.95 for 1 is off by exactly 5 % and right, in binary floats by a little more and wrong.
- Blanks at both ends are trimmed (VLMEvalKit does, on predictions). ``nan``, ``inf`` and ``1_000`` are text.

Percent signs are where implementations differ most. ``percent="ratio"`` is pix2struct's; ``"drop"`` is Megatron-LM's
(examples/multimodal/evaluation/evaluate_vqav2.py), which makes "14%" right for "14"; mistral-evals accepts either
reading, and drops dollar signs. Other units stay part of the text everywhere ("5 kg" is no number). With a negative
reference Megatron-LM's interval is empty, and copies that divide by the signed reference accept anything below it;
neither is done here.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import ClassVar, Literal

import pydantic

from megavlm.config import Config
from megavlm.evaluation.metrics.item import Item, MetricResult, average_of_best

# The exponent is bounded, since a model may write 1e999999999, which decimal arithmetic refuses.
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?", re.IGNORECASE)
_WITH_COMMAS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")


class RelaxedAccuracy(Config):
    """1 where the prediction is near enough to a reference, else 0."""

    kind: Literal["relaxed_accuracy"] = "relaxed_accuracy"
    tolerance: float = pydantic.Field(default=0.05, ge=0, lt=1)
    """Largest deviation of a right number, as a share of the reference."""
    percent: Literal["ratio", "drop"] = "ratio"
    """``ratio``: 14% is the number 0.14. ``drop``: it is 14."""
    thousands_commas: bool = True
    """Whether 1,000 is a number. False compares it as text, as pix2struct does."""
    highest: ClassVar[float] = 1.0

    def score(self, items: Sequence[Item]) -> MetricResult:
        """Score all items of all ranks.

        Raises:
            ValueError: there are no items.
        """
        return average_of_best(items, self._compare)

    def _compare(self, prediction: str, reference: str) -> float:
        said, truth = self._read_number(prediction), self._read_number(reference)
        if said is None or truth is None:
            return float(prediction.strip().lower() == reference.strip().lower())
        # str: the tolerance that was meant, 0.05, not the binary number next to it
        return float(abs(said - truth) <= Decimal(str(self.tolerance)) * abs(truth))

    def _read_number(self, text: str) -> Decimal | None:
        """Return the number that the whole text writes; ``None`` where it writes something else."""
        text = text.strip()
        digits = text.removesuffix("%").rstrip()
        if self.thousands_commas and _WITH_COMMAS.fullmatch(digits):
            digits = digits.replace(",", "")
        if not _NUMBER.fullmatch(digits):
            return None
        number = Decimal(digits)
        return number / 100 if text.endswith("%") and self.percent == "ratio" else number
