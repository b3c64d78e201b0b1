"""VQA accuracy: agreement with what ten people answered.

Source: VQA (arXiv 1505.00468) and VQAv2 (arXiv 1612.00837); GT-Vision-Lab/VQA,
PythonEvaluationTools/vqaEvaluation/vqaEval.py at a013f00. An answer that at least three people gave is right; to be
comparable with a person judged by the other nine, the script leaves out each of the ten in turn and takes the mean of
min(1, matches among the other nine / 3). One match gives 0.3, two 0.6, three 0.9, four or more 1.

Where published implementations differ, and which one is followed:

- If all ten people wrote the same, the official script compares *without any normalisation*: "Yes." is wrong for ten
  times "yes". Followed, since it is what the benchmark publishes. VLMEvalKit, Megatron-LM and newer versions of
  lmms-eval (pull request 794) always normalise: ``normalize_unanimous=True``.
- Megatron-LM (examples/multimodal/evaluation/evaluate_vqav2.py) takes min(1, matches among ten / 3) without leaving
  anyone out: three matches give 1, not 0.9.
- Copies of the script older than 2017 normalise only the prediction's articles and number words, so that the
  reference "the cat" can never be met.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from megavlm.config import Config
from megavlm.evaluation.metrics.item import Item, MetricResult, average
from megavlm.evaluation.metrics.vqa_normalization import normalize_answer

_FULL_AGREEMENT = 3


class VQAAccuracy(Config):
    """Share of people who agree, counted full from four of ten on."""

    kind: Literal["vqa_accuracy"] = "vqa_accuracy"
    normalize_unanimous: bool = False
    """Also normalise where all references are the same string."""
    highest: ClassVar[float] = 1.0

    def score(self, items: Sequence[Item]) -> MetricResult:
        """Score all items of all ranks. Every reference is one person's answer, equal ones repeated.

        Raises:
            ValueError: there are no items, or one has too few references for a full score.
        """
        return average([self._score_item(item) for item in items])

    def _score_item(self, item: Item) -> float:
        answers = [_trim(reference) for reference in item.references]
        said = _trim(item.prediction)
        if self.normalize_unanimous or len(set(answers)) > 1:
            answers = [normalize_answer(answer) for answer in answers]
            said = normalize_answer(said)
        return agreement(item, said, answers)


def agreement(item: Item, said: str, answers: Sequence[str]) -> float:
    """Mean over the people left out of min(1, matches among the others / 3).

    Args:
        item: names the question in the error; if its prediction is blank, the score is 0.
        said: the prediction, normalised.
        answers: the people's answers, normalised.

    Raises:
        ValueError: fewer than four answers: whoever is left out, three others cannot agree.
    """
    total = len(answers)
    if total <= _FULL_AGREEMENT:
        raise ValueError(
            f"{item.key}: references={list(item.references)}: VQA accuracy needs the answers of at least "
            f"{_FULL_AGREEMENT + 1} people (VQAv2 has 10), here are {total}. Repeat equal answers, or use exact_match."
        )
    if item.is_blank:
        return 0.0
    matches = sum(answer == said for answer in answers)
    if matches == 0:
        return 0.0
    # leaving out one of the matching people takes one match away, leaving out another person takes none
    left_out = matches * min(matches - 1, _FULL_AGREEMENT) + (total - matches) * min(matches, _FULL_AGREEMENT)
    return left_out / (_FULL_AGREEMENT * total)


def _trim(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
