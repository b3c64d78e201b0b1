"""OCRBench: containment, and formulas without blanks."""

import pytest

from megavlm.evaluation.metrics import Item, OCRBenchAccuracy
from megavlm.evaluation.metrics.ocrbench_accuracy import FORMULA_CATEGORIES


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The sign says STOP.", ["Stop"], 1.0),
        ("ST OP", ["stop"], 0.0),
        ("grand\nhotel", ["Grand Hotel"], 1.0),
        ("grand hotel", ["Grand\nHotel "], 1.0),
        ("312", ["12"], 1.0),  # no word boundaries
        ("$1,000", ["$1000"], 0.0),
        ("\u7981\u6b62\u5438\u70df", ["\u5438\u70df"], 1.0),
        ("left", ["right", "left"], 1.0),
        ("left", ["right", " "], 0.0),
    ],
)
def test_text(prediction: str, references: list[str], expected: float) -> None:
    assert OCRBenchAccuracy().score([Item("q", prediction, references, category="Doc-oriented VQA")]).value == expected


@pytest.mark.parametrize("category", FORMULA_CATEGORIES)
@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("$ \\frac { 1 } {2}\n+ x $", "\\frac {1} {2} + x", 1.0),
        ("X + 1", "x+1", 0.0),  # case counts
        ("X + 1", "X+1", 1.0),
    ],
)
def test_formulas(category: str, prediction: str, reference: str, expected: float) -> None:
    assert OCRBenchAccuracy().score([Item("q", prediction, [reference], category=category)]).value == expected


def test_text_and_formulas_in_one_run() -> None:
    items = [Item("1", "x + 1", ["x+1"]), Item("2", "x + 1", ["x+1"], category=FORMULA_CATEGORIES[0])]
    assert OCRBenchAccuracy().score(items).per_item == (0.0, 1.0)
