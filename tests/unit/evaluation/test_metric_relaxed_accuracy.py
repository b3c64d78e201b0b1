"""Relaxed accuracy: numbers, percent signs, commas, signs, zero, text."""

import pytest

from megavlm.evaluation.metrics import Item, RelaxedAccuracy


def score(prediction: str, *references: str, **options: object) -> float:
    return RelaxedAccuracy(**options).score([Item("q", prediction, references)]).value


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("105", "100", 1.0),  # exactly 5 %
        ("95", "100", 1.0),
        ("105.01", "100", 0.0),
        ("94.99", "100", 0.0),
        ("0.95", "1", 1.0),  # 0.050000000000000044 in binary floats
        ("2008", "2010", 1.0),  # years are numbers
        ("-5.2", "-5", 1.0),
        ("-4.7", "-5", 0.0),
        ("-50", "-5", 0.0),
        ("5", "-5", 0.0),
        ("+.5", "0.5", 1.0),
        ("1e3", "1000", 1.0),
        ("0", "0", 1.0),
        ("0.0", "0", 1.0),
        ("0.001", "0", 0.0),  # 5 % of nothing is nothing
        ("1,020", "1000", 1.0),
        ("1,000,000.5", "1000000", 1.0),
        ("1,00", "100", 0.0),  # no thousands
        ("5%", "0.05", 1.0),
        ("5 %", "5.1%", 1.0),
        ("14%", "14", 0.0),
        ("0%", "0", 1.0),
        ("1,000%", "10", 1.0),
        (" 12 \n", "12", 1.0),
        ("Blue", "blue", 1.0),
        ("blues", "blue", 0.0),  # text has no tolerance
        ("12 kg", "12", 0.0),  # units make text
        ("12 KG", "12 kg", 1.0),
        ("about 12", "12", 0.0),
        ("[Yes, No]", "[yes, no]", 1.0),
        ("nan", "12", 0.0),
        ("nan", "NaN", 1.0),  # as text
        ("inf", "12", 0.0),
        ("1_000", "1000", 0.0),
        ("1e999999999", "12", 0.0),
        ("%", "0", 0.0),
    ],
)
def test_defaults(prediction: str, reference: str, expected: float) -> None:
    assert score(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [("14%", "14", 1.0), ("14", "14.5%", 1.0), ("14%", "0.14", 0.0), ("14%", "14%", 1.0)],
)
def test_percent_signs_dropped(prediction: str, reference: str, expected: float) -> None:
    assert score(prediction, reference, percent="drop") == expected


def test_commas_as_text() -> None:
    assert score("1,000", "1000", thousands_commas=False) == 0.0
    assert score("1,000", "1,000", thousands_commas=False) == 1.0


def test_tolerance() -> None:
    assert score("101", "100", tolerance=0.01) == 1.0
    assert score("101", "100", tolerance=0.0) == 0.0
    assert score("100.0", "100", tolerance=0.0) == 1.0


def test_any_reference_is_enough() -> None:
    assert score("3", "three", "3.1") == 1.0
