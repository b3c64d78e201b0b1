"""VQA accuracy: normalisation, leaving one person out, TextVQA's variant."""

import pytest

from megavlm.evaluation.metrics import Item, TextVQAAccuracy, VQAAccuracy
from megavlm.evaluation.metrics.vqa_normalization import normalize_answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Cat", "cat"),
        ("an apple a day", "apple day"),
        ("a", ""),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),  # up to ten
        ("100,978", "100978"),  # the example of visualqa.org
        ("red, white", "red white"),  # beside a blank a mark vanishes
        ("red,white", "red white"),  # otherwise it becomes one
        ("t-shirt", "t shirt"),
        ("t-shirt - blue", "tshirt blue"),  # one mark beside a blank takes the others of its kind with it
        ("x-y-;z", "x y z"),  # blanks that were marks before do not count
        ("x;-y-z", "x y z"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits takes all marks
        ("2:50 pm", "2:50 pm"),  # the colon stays
        ("girl's", "girl's"),  # the apostrophe too
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("Id've", "id've"),  # capitals in the script's table are never reached
        ("its", "its"),  # its and it's are both words
        ("somebody'd", "somebodyd"),  # the wrong way round in the script
        ("3.5", "3.5"),
        ("5.", "5"),
        ("u.s.a.", "usa"),
        (".5", ".5"),
        ("yes!\n", "yes"),
        ("one\ttwo", "1 2"),
        ("caf\u00e9", "caf\u00e9"),
        ("", ""),
    ],
)
def test_normalization(answer: str, expected: str) -> None:
    assert normalize_answer(answer) == expected


def of_ten(matches: int) -> Item:
    return Item("q", "red", ["red"] * matches + [f"other {number}" for number in range(10 - matches)])


# One match: left out once in ten (0), kept nine times (1/3): 9 * 1/3 / 10 = 0.3. Two: (2 * 1/3 + 8 * 2/3) / 10 = 0.6.
# Three: (3 * 2/3 + 7 * 1) / 10 = 0.9. From four on three of the other nine always agree.
@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
@pytest.mark.parametrize("metric", [VQAAccuracy(), TextVQAAccuracy()], ids=lambda metric: metric.kind)
def test_agreement_of_ten(metric: VQAAccuracy | TextVQAAccuracy, matches: int, expected: float) -> None:
    assert metric.score([of_ten(matches)]).value == pytest.approx(expected, abs=1e-15)


def test_both_sides_are_normalised() -> None:
    item = Item("q", "The Two dogs.", ["2 dogs", "two dogs", "2 dogs!", "the 2 dogs"] + ["cats"] * 6)
    assert VQAAccuracy().score([item]).value == 1.0


@pytest.mark.parametrize(("prediction", "expected"), [("Yes.", 0.0), ("yes", 1.0), (" yes\n", 1.0)])
def test_the_official_script_does_not_normalise_unanimous_answers(prediction: str, expected: float) -> None:
    item = Item("q", prediction, ["yes"] * 10)
    assert VQAAccuracy().score([item]).value == expected
    assert VQAAccuracy(normalize_unanimous=True).score([item]).value == 1.0
    assert TextVQAAccuracy().score([item]).value == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "textvqa", "vqa"),
    [
        ("joe 's", "Joe's", 1.0, 0.0),  # 's is a word of its own
        ("t shirt, red", "t-shirt red", 1.0, 1.0),
        ("1,000 t-shirts", "1000 t shirts", 1.0, 0.0),  # without the comma the hyphen becomes a blank
        ("what?", "what", 1.0, 1.0),
        ("red,white", "redwhite", 1.0, 0.0),  # the comma goes first
        ("red?white", "redwhite", 1.0, 0.0),
        ("dont", "don't", 1.0, 1.0),
    ],
)
def test_textvqa_normalises_more(prediction: str, reference: str, textvqa: float, vqa: float) -> None:
    item = Item("q", prediction, [reference] * 9 + ["something else"])
    assert TextVQAAccuracy().score([item]).value == textvqa
    assert VQAAccuracy().score([item]).value == vqa


@pytest.mark.parametrize("metric", [VQAAccuracy(), TextVQAAccuracy()], ids=lambda metric: metric.kind)
def test_too_few_people(metric: VQAAccuracy | TextVQAAccuracy) -> None:
    with pytest.raises(ValueError, match=r"q3: references=.* at least 4 people \(VQAv2 has 10\), here are 3"):
        metric.score([Item("q3", "red", ["red"] * 3)])
    assert metric.score([Item("q4", "red", ["red"] * 4)]).value == 1.0


def test_an_empty_answer_is_wrong_even_where_people_said_only_an_article() -> None:
    assert VQAAccuracy().score([Item("q", "", ["a"] * 5 + ["the"] * 5)]).value == 0.0
    assert VQAAccuracy().score([Item("q", "the", ["a"] * 9 + ["an"])]).value == 1.0  # as the script has it
