"""TextVQA accuracy: VQA accuracy with one more step of normalisation, and always normalised.

Source: TextVQA (arXiv 1904.08920); ``TextVQAAccuracyEvaluator`` of facebookresearch/mmf (mmf/utils/m4c_evaluators.py),
which LLaVA and lmms-eval copy and which is followed here. Before VQAv2's rules it lower-cases, removes commas and
question marks, and splits "'s" from its word, on both sides: "Joe's" is "joe 's", and "don't panic, now" keeps no
comma to decide about other marks. Unlike ``vqa_accuracy`` it normalises also where all ten people agree.

VLMEvalKit uses plain VQAv2 rules on both sides (``vqa_accuracy`` with ``normalize_unanimous=True``), and Megatron-LM
those without leaving anyone out. MMF insists on ten references; here four or more are enough.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from megavlm.config import Config
from megavlm.evaluation.metrics.item import Item, MetricResult, average
from megavlm.evaluation.metrics.vqa_accuracy import agreement
from megavlm.evaluation.metrics.vqa_normalization import normalize_answer


class TextVQAAccuracy(Config):
    """Share of people who agree, counted full from four of ten on."""

    kind: Literal["textvqa_accuracy"] = "textvqa_accuracy"
    highest: ClassVar[float] = 1.0

    def score(self, items: Sequence[Item]) -> MetricResult:
        """Score all items of all ranks. Every reference is one person's answer, equal ones repeated.

        Raises:
            ValueError: there are no items, or one has fewer than four references.
        """
        return average(
            [
                agreement(item, _normalize(item.prediction), [_normalize(text) for text in item.references])
                for item in items
            ]
        )


def _normalize(answer: str) -> str:
    return normalize_answer(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))
