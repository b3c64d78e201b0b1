"""GQA accuracy: exact match after lower-casing and removing punctuation.

Source: GQA (arXiv 1902.09506). The official ``eval.py`` compares strings as they are, for models that choose from a
list of answers. For models that write, published figures normalise first, in two ways:

- lmms-eval (lmms_eval/tasks/gqa/gqa.yaml): ``exact_match`` with ``ignore_case`` and ``ignore_punctuation``, on both
  sides. Followed here, with blanks trimmed and runs of blanks made one, so that "Yes.\\n" is "yes".
- LLaVA (scripts/convert_gqa_for_eval.py): lower case and no final period, on the prediction only.

They differ on punctuation inside an answer ("t-shirt" and "tshirt" are one answer here and two there). Articles and
number words count in all of them.
"""

import string
from collections.abc import Sequence
from typing import ClassVar, Literal

from megavlm.config import Config
from megavlm.evaluation.metrics.item import Item, MetricResult, average_of_best

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class GQAAccuracy(Config):
    """1 where the normalised prediction equals a normalised reference, else 0."""

    kind: Literal["gqa_accuracy"] = "gqa_accuracy"
    highest: ClassVar[float] = 1.0

    def score(self, items: Sequence[Item]) -> MetricResult:
        """Score all items of all ranks.

        Raises:
            ValueError: there are no items.
        """
        return average_of_best(items, _compare)


def _compare(prediction: str, reference: str) -> float:
    said = _normalize(prediction)
    # an answer of punctuation alone says nothing, and must not equal a reference of other punctuation
    return float(said != "" and said == _normalize(reference))


def _normalize(answer: str) -> str:
    return " ".join(answer.lower().translate(_PUNCTUATION).split())
