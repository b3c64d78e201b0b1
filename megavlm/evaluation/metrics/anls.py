"""ANLS: average normalised Levenshtein similarity, for answers read from documents.

Source: Biten et al., ST-VQA (arXiv 1905.13648) and DocVQA (arXiv 2007.00398); the script of the Robust Reading
Competition for DocVQA and InfographicVQA (rrc.cvc.uab.es, copied in shunk031/ANLS). Both sides are lower-cased and
runs of blanks made one; similarity is 1 - distance / length of the longer one; the best reference counts; similarity
below the threshold is 0. Punctuation and articles count.

Where published implementations differ, and which one is followed:

- Exactly at the threshold (half of the letters wrong): the papers and Megatron-LM give 0, the competition's script,
  lmms-eval and VLMEvalKit keep 0.5. Followed: the script.
- Length: the script and lmms-eval divide by the length *before* blanks are trimmed, so that a hundred blanks behind a
  wrong answer make it nearly right. Followed: VLMEvalKit and MMF, which divide by the compared strings; without
  surplus blanks it is the same number.
- Megatron-LM first normalises both sides as VQAv2 does (articles, number words). Not done here.
- pix2struct keeps runs of blanks; mistral-evals has threshold 0 and drops final punctuation. Not done here.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import pydantic

from megavlm.config import Config
from megavlm.evaluation.metrics.item import Item, MetricResult, average_of_best


class ANLS(Config):
    """Letters that agree with the nearest reference, as a share; 0 below the threshold."""

    kind: Literal["anls"] = "anls"
    threshold: float = pydantic.Field(default=0.5, ge=0, le=1)
    """Similarity below it counts as a wrong answer, not as a misread right one. 0: every letter counts."""
    highest: ClassVar[float] = 1.0

    def score(self, items: Sequence[Item]) -> MetricResult:
        """Score all items of all ranks.

        Raises:
            ValueError: there are no items.
        """
        return average_of_best(items, self._similarity)

    def _similarity(self, prediction: str, reference: str) -> float:
        said, truth = (" ".join(text.lower().split()) for text in (prediction, reference))
        length = max(len(said), len(truth))
        # the distance is at least the difference in length: long ramblings need no table of edits
        if 1 - abs(len(said) - len(truth)) / length < self.threshold:
            return 0.0
        similarity = 1 - _levenshtein(said, truth) / length
        return similarity if similarity >= self.threshold else 0.0


def _levenshtein(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of single letters that turn one string into the other."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, start=1):
        above, row = row, [number]
        for column, wanted in enumerate(other):
            row.append(min(above[column] + (letter != wanted), above[column + 1] + 1, row[column] + 1))
    return row[-1]
