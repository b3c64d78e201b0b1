"""Exact match, and GQA's with normalisation."""

import pytest

from megavlm.evaluation.metrics import ExactMatch, GQAAccuracy, Item


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        (" 13\n", ["13"], 1.0),
        ("13", ["12", " 13 "], 1.0),
        ("Yes", ["yes"], 0.0),
        ("13.", ["13"], 0.0),
        ("1 3", ["13"], 0.0),
        ("\u6771\u4eac", ["\u6771\u4eac"], 1.0),
    ],
)
def test_exact_match(prediction: str, references: list[str], expected: float) -> None:
    assert ExactMatch().score([Item("q", prediction, references)]).value == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Yes.\n", ["yes"], 1.0),
        ("T-Shirt", ["tshirt"], 1.0),
        ("dining  table", ["dining table"], 1.0),
        ("diningtable", ["dining table"], 0.0),
        ("the dog", ["dog"], 0.0),
        ("two", ["2"], 0.0),
        ("cat", ["dog", "Cat"], 1.0),
        ("...", ["?"], 0.0),
    ],
)
def test_gqa_accuracy(prediction: str, references: list[str], expected: float) -> None:
    assert GQAAccuracy().score([Item("q", prediction, references)]).value == expected


def test_the_value_is_the_mean() -> None:
    items = [Item("1", "a", ["a"]), Item("2", "b", ["a"]), Item("3", "c", ["a"]), Item("4", "d", ["d"])]
    result = ExactMatch().score(items)
    assert (result.per_item, result.value) == ((1.0, 0.0, 0.0, 1.0), 0.5)
