"""Counts as the bars of a small drawing."""

from collections.abc import Mapping
from dataclasses import dataclass

# Units of the drawing (megavlm/inspection/template/page.html.jinja): bars stand on a line, with room for numbers.
_WIDTH, _FLOOR, _TALLEST = 400.0, 110.0, 92.0
_MOST_BARS = 24
_MOST_LABELS = 8
_MOST_COUNTS = 12


@dataclass(frozen=True)
class Bar:
    """How many have a value, or one in a range."""

    label: str
    count: int
    x: float
    y: float
    width: float
    height: float
    shows_label: bool


@dataclass(frozen=True)
class Histogram:
    """Bars beside each other."""

    bars: tuple[Bar, ...]
    shows_counts: bool
    """Whether there is room for the numbers above them."""


def histogram(counts: Mapping[int, int], most_bars: int = _MOST_BARS) -> Histogram:
    """Draw how many have which value.

    Args:
        counts: how many, by value.
        most_bars: more values share bars, each for a range of equal width.
    """
    if not counts:
        return Histogram((), shows_counts=False)
    lowest = min(counts)
    step = -(-(max(counts) - lowest + 1) // most_bars)
    bins = [0] * ((max(counts) - lowest) // step + 1)
    for value, count in counts.items():
        bins[(value - lowest) // step] += count
    width = _WIDTH / len(bins)
    every = -(-len(bins) // _MOST_LABELS)
    bars = []
    for number, count in enumerate(bins):
        first = lowest + number * step
        height = _TALLEST * count / max(bins)
        bars.append(
            Bar(
                label=str(first) if step == 1 else f"{first}-{first + step - 1}",
                count=count,
                x=round(number * width + 0.08 * width, 2),
                y=round(_FLOOR - height, 2),
                width=round(0.84 * width, 2),
                height=round(height, 2),
                shows_label=number % every == 0 and (number == 0 or number + every // 2 < len(bins)),
            )
        )
    return Histogram(tuple(bars), shows_counts=len(bins) <= _MOST_COUNTS)
