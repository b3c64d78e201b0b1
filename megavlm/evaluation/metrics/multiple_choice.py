"""Multiple choice: the option that a free answer names.

Source: MMMU (arXiv 2311.16502), MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py, ``parse_multi_choice_response``.
Its steps come first and as they are, so that wherever it finds an option, the same option is found here (but no option
of blank text, which it finds in every sentence):

1. ``(B)`` anywhere; 2. the letter between blanks, after ``, . ! ? ; : '`` around the whole answer are stripped; 3. in
answers of more than five words, an option's text anywhere, case aside. Of several options the one named last counts.
Known to err: in "A cat" the article is an option (step 2), and with step 3 an option's text may lie inside another's.

Where it finds nothing, MMMU draws an option at random, which gives a weak model up to a quarter of these questions.
Here two more steps follow, and what is left is wrong and counted in ``num_unparsed``:

4. the whole answer is a small letter or the text of one option ("b", "Red."), case and punctuation around it aside;
5. the letter as a word of its own ("B.", "B) red", "**B**", "Answer:\\nB", but not in "A's"), the last counting.

Others: lmms-eval looks for "B." before step 3, and in step 2 for the letter before a blank, so that "DNA is" names A.
VLMEvalKit takes a letter or a text only if it is the only one named, and asks a judge model otherwise. For AI2D,
Megatron-LM compares the whole answer with the letter, lmms-eval takes an option's text from the question.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from megavlm.config import Config
from megavlm.evaluation.metrics.item import Item, MetricResult, average

# more words than this and the answer is a sentence, which may quote an option's text
_SHORT_ANSWER_WORDS = 5


class MultipleChoice(Config):
    """1 where the option named by the prediction is right, else 0."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    highest: ClassVar[float] = 1.0

    def score(self, items: Sequence[Item]) -> MetricResult:
        """Score all items of all ranks. References are letters (several: any is right), ``choices`` the texts.

        Raises:
            ValueError: there are no items, or one has no choices, more than 26, or a reference that is no letter of
                theirs.
        """
        named = [find_choice(item.prediction, label_choices(item)) for item in items]
        right = [
            float(letter in {reference.strip() for reference in item.references})
            for item, letter in zip(items, named, strict=True)
        ]
        return average(right, num_unparsed=named.count(None))


def label_choices(item: Item) -> dict[str, str]:
    """Return letter -> text of an item's options.

    Raises:
        ValueError: there are no choices, more than 26, or a reference is none of their letters.
    """
    if not 1 <= len(item.choices) <= len(string.ascii_uppercase):
        raise ValueError(
            f"{item.key}: choices={list(item.choices)}: a multiple choice question has 1 to "
            f"{len(string.ascii_uppercase)} options, this one has {len(item.choices)}. Give the options' texts."
        )
    choices = dict(zip(string.ascii_uppercase, item.choices, strict=False))
    for reference in item.references:
        if reference.strip() and reference.strip() not in choices:
            raise ValueError(
                f"{item.key}: references={list(item.references)}: {reference!r} is none of the letters "
                f"{', '.join(choices)} of its {len(choices)} options. Give the right option's letter, not its text."
            )
    return choices


def find_choice(answer: str, choices: Mapping[str, str]) -> str | None:
    """Find the letter of the option that an answer names.

    Args:
        answer: free text.
        choices: letter -> text of each option.

    Returns:
        The letter; ``None`` where the answer names no option.
    """
    stripped = answer
    for mark in ",.!?;:'":
        stripped = stripped.strip(mark)
    padded = f" {stripped} "
    for pattern in ("({})", " {} "):
        if letter := _last_named(padded, {letter: pattern.format(letter) for letter in choices}):
            return letter
    if len(padded.split()) > _SHORT_ANSWER_WORDS:
        # a blank text would be found everywhere
        texts = {letter: text.lower() for letter, text in choices.items() if text.strip()}
        if letter := _last_named(padded.lower(), texts):
            return letter
    if letter := _whole_answer(answer, choices):
        return letter
    alone = re.findall(rf"(?<![^\W_])([{''.join(choices)}])(?!'?[^\W_])", answer)
    return alone[-1] if alone else None


def _last_named(answer: str, names: dict[str, str]) -> str | None:
    """Return the letter whose name begins last in the answer; of names beginning at one place the first option's."""
    places = {answer.rfind(name): letter for letter, name in reversed(names.items())}
    places.pop(-1, None)
    return places[max(places)] if places else None


def _whole_answer(answer: str, choices: Mapping[str, str]) -> str | None:
    """Return the only option whose letter or text the whole answer is, case and punctuation around it aside."""
    said = _bare(answer)
    letters = [letter for letter, text in choices.items() if said and said in (letter.lower(), _bare(text))]
    return letters[0] if len(letters) == 1 else None


def _bare(text: str) -> str:
    return text.strip(string.punctuation + string.whitespace).lower()
