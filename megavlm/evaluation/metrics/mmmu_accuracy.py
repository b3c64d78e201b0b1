"""MMMU's accuracy: of its multiple choice questions by the option named, of its open ones by what the answer contains.

Source: MMMU (arXiv 2311.16502), MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py. Questions with choices are scored by
:mod:`megavlm.evaluation.metrics.multiple_choice`. An open answer is read in these steps:

1. It is made lower case, full stops at its ends are dropped, and it is cut into lines.
2. Of each line the claim is kept: what stands behind the last of "could be", "so", "is", "thus", "therefore", "final",
   "answer", "result", and in the last line also of "="; of several such words the one that leaves least. A claim that
   is a single punctuation mark, and a line without such a word, are dropped. With no claim at all the whole answer is
   the only one.
3. The numbers inside the claims (1,234, 1.5e3, -2.75) become claims of their own.
4. A claim that is a number counts as one, rounded to two decimals; references too.

Right is an answer of which a number claim equals a number reference, or a text claim contains a text reference. A
reference of one letter must stand with a blank before or behind it. Known to err: "red" lies in "hundred", and "not
blue" contains "blue"; numbers in a text reference ("5 cm") are never compared as numbers; the end of 1,234 and
of 3e2 counts as a number too; ".5" alone loses its point in step 1. One difference: a blank
reference, which every text contains, matches nothing.
"""

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from megavlm.config import Config
from megavlm.evaluation.metrics.item import Item, MetricResult, average
from megavlm.evaluation.metrics.multiple_choice import find_choice, label_choices

_CLAIM_WORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MARKS = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b[0-9]{1,3}(?:,[0-9]{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?e[+-]?\d+"),  # 1.5e3
    # 2.75, .5, 12; neither the beginning of the two above nor a part of a longer number
    re.compile(r"-?(?:\d*\.\d+|\d+\b)(?!e[+-]?\d|[,\d])"),
)


class MMMUAccuracy(Config):
    """1 where the right option is named, or the open answer contains a reference, else 0."""

    kind: Literal["mmmu_accuracy"] = "mmmu_accuracy"
    highest: ClassVar[float] = 1.0

    def score(self, items: Sequence[Item]) -> MetricResult:
        """Score all items of all ranks. Items with ``choices`` are multiple choice, their references letters.

        Raises:
            ValueError: there are no items, or the choices and references of one are not those of multiple choice.
        """
        scores, num_unparsed = [], 0
        for item in items:
            if not item.choices:
                scores.append(float(not item.is_blank and is_right(item.prediction, item.references)))
                continue
            letter = find_choice(item.prediction, label_choices(item))
            num_unparsed += letter is None
            scores.append(float(letter in {reference.strip() for reference in item.references}))
        return average(scores, num_unparsed=num_unparsed)


def is_right(answer: str, references: Sequence[str]) -> bool:
    """Whether an open answer contains one of the references."""
    truths = [truth for reference in references if reference.strip() for truth in _values(reference)]
    said = [value for claim in find_claims(answer) for value in _values(claim)]
    return any(_matches(value, truth) for value in said for truth in truths)


def _matches(value: str | float, truth: str | float) -> bool:
    if isinstance(value, str):
        return isinstance(truth, str) and truth in value
    return value == truth


def find_claims(answer: str) -> list[str]:
    """What an open answer claims: the ends of its lines, and the numbers in them."""
    whole = answer.strip().strip(".").lower()
    *lines, last = whole.split("\n")
    found = [_claim(line, _CLAIM_WORDS) for line in lines] + [_claim(last, (*_CLAIM_WORDS, "="))]
    claims = [claim for claim in found if claim and claim not in _MARKS] or [whole]
    return claims + [number for claim in claims for pattern in _NUMBERS for number in pattern.findall(claim)]


def _claim(line: str, words: Sequence[str]) -> str:
    """The shortest of the texts behind a claim word; empty where there is none."""
    ends = [line.rpartition(word)[2].strip() for word in words if word in line]
    return min((end for end in ends if end), key=len, default="")


def _values(text: str) -> list[str | float]:
    """A text as it is compared: a number, or in lower case; a single letter with a blank on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
