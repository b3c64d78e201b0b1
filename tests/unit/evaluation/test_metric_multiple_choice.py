"""Multiple choice: from free text to a letter."""

import pytest

from megavlm.evaluation.metrics import Item, MultipleChoice
from megavlm.evaluation.metrics.multiple_choice import find_choice

CHOICES = {"A": "cell", "B": "cell wall", "C": "Type-B", "D": "none of these"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # MMMU's steps: in brackets, ...
        ("(B)", "B"),
        ("The answer is (C), not A .", "C"),
        ("First (A), then (B) - no, (A) again", "A"),  # the last one counts
        # ... between blanks, ...
        ("B", "B"),
        ("B.", "B"),
        ("The answer is D!", "D"),
        ("A or B ?", "B"),
        ("A cat", "A"),  # known to err: the article
        # ... an option's text, in answers of more than five words
        ("It must be the cell wall", "A"),
        ("It is the cell wall", None),  # five words
        ("I think that it is none of these", "D"),
        ("It is the CELL WALL that you see", "A"),  # both begin at the same place: MMMU takes the first option
        ("the cell wall, or rather only the cell", "A"),
        ("not the cell but, I think, Type-B", "C"),
        # steps where MMMU draws at random: the whole answer ...
        ("b", "B"),
        ("(d).", "D"),
        ("Cell wall.", "B"),
        ("type-b", "C"),
        ("Type-B", "C"),  # not the letter in it
        # ... and the letter on its own
        ("B. cell", "B"),
        ("B) cell wall", "B"),
        ("**C**", "C"),
        ("'B' it is", "B"),
        ("I say:_B_", "B"),
        ("Answer:\nD", "D"),
        ("A: no, B: yes", "B"),
        # nothing
        ("", None),
        ("E", None),
        ("It's 5", None),
        ("DNA", None),
        ("A's", None),
        ("cells", None),  # a short answer must be the text, not contain it
        ("I do not know which one it may be", None),
    ],
)
def test_find_choice(answer: str, expected: str | None) -> None:
    assert find_choice(answer, CHOICES) == expected


def test_options_of_the_same_text_are_not_told_apart() -> None:
    assert find_choice("red", {"A": "red", "B": "Red"}) is None
    assert find_choice("b", {"A": "b", "B": "a"}) is None


def test_options_without_text_are_passed_over() -> None:
    assert find_choice("this one shows a red car clearly", {"A": "", "B": " ", "C": "red"}) == "C"
    assert find_choice("...", {"A": "", "B": "."}) is None


def test_unparsed_answers_are_wrong_and_counted() -> None:
    options = list(CHOICES.values())
    items = [
        Item("1", "(A)", ["A"], options),
        Item("2", "perhaps", ["A"], options),
        Item("3", "", ["B"], options),
        Item("4", "C", ["B", "C"], options),
        Item("5", "C", ["B"], options),
    ]
    result = MultipleChoice().score(items)
    assert (result.per_item, result.num_unparsed) == ((1.0, 0.0, 0.0, 1.0, 0.0), 2)
    assert result.value == 2 / 5


def test_a_letter_without_an_option_is_no_answer() -> None:
    result = MultipleChoice().score([Item("1", "D", ["A"], ["yes", "no"])])
    assert (result.value, result.num_unparsed) == (0.0, 1)


@pytest.mark.parametrize("count", [0, 27])
def test_number_of_options(count: int) -> None:
    with pytest.raises(ValueError, match=rf"q9: choices=.* 1 to 26 options, this one has {count}"):
        MultipleChoice().score([Item("q9", "A", ["A"], ["x"] * count)])


@pytest.mark.parametrize("reference", ["C", "a", "yes", "0"])
def test_a_reference_is_a_letter_of_the_options(reference: str) -> None:
    with pytest.raises(ValueError, match=rf"q9: .*'{reference}' is none of the letters A, B of its 2 options"):
        MultipleChoice().score([Item("q9", "A", [reference], ["yes", "no"])])
