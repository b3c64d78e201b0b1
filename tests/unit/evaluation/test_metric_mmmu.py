"""MMMU's accuracy, worked by hand after the steps of its parser."""

import pytest

from megavlm.evaluation.metrics import Item, MMMUAccuracy
from megavlm.evaluation.metrics.mmmu_accuracy import find_claims


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        # numbers: rounded to two decimals, commas aside, wherever they stand in a claim
        ("3.5", ["3.5"], 1.0),
        ("3.501", ["3.5"], 1.0),
        ("3.51", ["3.5"], 0.0),
        ("It is 1,234 dollars.", ["1234"], 1.0),
        ("1.5e3 volts", ["1,500"], 1.0),
        ("-2.75", ["2.75"], 0.0),
        ("The result is -2.75 m", ["-2.75"], 1.0),
        ("x = 2 + 2 = 4", ["4"], 1.0),
        ("x = 2 + 2 = 4", ["2"], 0.0),  # only what stands behind the last "="
        ("4 = x\nSo it goes", ["4"], 0.0),  # "=" counts in the last line alone
        ("x is .5", ["0.5"], 1.0),
        (".5", ["0.5"], 0.0),  # the stop is taken for the end of a sentence
        ("50%", ["50"], 1.0),
        ("between 10 and 12", ["12"], 1.0),
        # a number claim is compared with numbers, a text claim with texts
        ("5", ["5 cm"], 0.0),
        ("It is 5 cm.", ["5 cm"], 1.0),
        # text: contained, case aside
        ("The answer is the Cell Wall.", ["cell wall"], 1.0),
        ("A cell wall", ["Cell wall."], 0.0),
        ("one hundred", ["red"], 1.0),
        ("It could be red or blue\nThus blue", ["green", "blue"], 1.0),
        ("blue, so it was red", ["blue"], 0.0),
        # one letter: with a blank beside it
        ("b", ["b"], 1.0),
        ("cab", ["b"], 0.0),
        ("it is b or c", ["b"], 1.0),
        # nothing
        ("", ["3"], 0.0),
        ("...", ["?"], 0.0),
        ("anything", ["", "thing"], 1.0),
        ("anything", ["", "else"], 0.0),
        ("nan", ["nan"], 0.0),
    ],
)
def test_open_answers(prediction: str, references: list[str], expected: float) -> None:
    assert MMMUAccuracy().score([Item("q", prediction, references)]).value == expected


@pytest.mark.parametrize(
    ("answer", "claims"),
    [
        ("Yes.", ["yes"]),
        ("The final answer is 12.", ["12", "12"]),
        ("It is so\nthe result is:\nred", ["so", "is:"]),
        ("The answer is :\nred", ["the answer is :\nred"]),  # a mark is no claim
        ("First 7\nTherefore the speed is 1,200 m/s", ["1,200 m/s", "1,200", "200"]),
        ("a = 3e2", ["3e2", "3e2", "2"]),
    ],
)
def test_claims(answer: str, claims: list[str]) -> None:
    assert find_claims(answer) == claims


def test_questions_with_options_are_multiple_choice() -> None:
    options = ("red", "blue")
    items = [
        Item("1", "(B)", ["B"], options),
        Item("2", "blue is what it is, I would say", ["A"], options),
        Item("3", "no idea", ["A"], options),
        Item("4", "blue", ["blue"]),
    ]
    result = MMMUAccuracy().score(items)
    assert (result.per_item, result.num_unparsed) == ((1.0, 0.0, 0.0, 1.0), 1)
    with pytest.raises(ValueError, match="is none of the letters"):
        MMMUAccuracy().score([Item("5", "(B)", ["blue"], options)])
