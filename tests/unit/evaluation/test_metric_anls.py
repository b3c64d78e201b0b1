"""ANLS, with distances counted by hand."""

import pydantic
import pytest

from megavlm.evaluation.metrics import ANLS, Item


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Coca Cola", ["Coca-Cola"], 8 / 9),  # one replacement in nine letters
        ("coca-colas", ["COCA-COLA"], 9 / 10),  # case does not count, one insertion
        ("ktten", ["sitting", "kitten"], 5 / 6),  # one deletion; the nearer reference counts
        ("kitten", ["sitting"], 4 / 7),  # two replacements and an insertion in seven
        ("abcd", ["abxy"], 0.5),  # exactly half: the competition's script keeps it
        ("ab", ["abcd"], 0.5),
        ("abc", ["axy"], 0.0),  # a third is below the threshold
        ("  New \n  York ", ["new york"], 1.0),  # runs of blanks are one
        ("newyork", ["new york"], 7 / 8),  # blanks count as letters
        ("the house", ["house"], 5 / 9),  # articles count
        ("$ 1,000", ["$1000"], 5 / 7),  # so do commas
        ("M\u00dcLLER", ["m\u00fcller"], 1.0),
        ("\u6771\u4eac\u90fd", ["\u6771\u4eac"], 2 / 3),  # letters, not bytes
        ("no" + " " * 100, ["yes"], 0.0),  # blanks at the end do not dilute the distance
        ("yes " + "and so on " * 50, ["yes"], 0.0),
    ],
)
def test_similarity(prediction: str, references: list[str], expected: float) -> None:
    # the same two roundings on both sides, at most a bit apart
    assert ANLS().score([Item("q", prediction, references)]).value == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, 1 / 3), (0.34, 0.0), (1 / 4, 1 / 3)])
def test_threshold(threshold: float, expected: float) -> None:
    result = ANLS(threshold=threshold).score([Item("q", "abc", ["axy"])])
    assert result.value == pytest.approx(expected, abs=1e-15)


def test_threshold_is_a_share() -> None:
    with pytest.raises(pydantic.ValidationError, match="less than or equal to 1"):
        ANLS(threshold=50)
