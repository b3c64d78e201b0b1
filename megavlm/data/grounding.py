"""Boxes and points of a row as text: what stands for ``<box>`` and ``<point>`` in its texts."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

CoordinateStyle = Literal["mm1_5", "nvlm"]
"""``mm1_5``: ``[x1, y1, x2, y2]`` and ``[x, y]``, 0 to 999 (the text of Ferret, arXiv 2310.07704, which MM1.5 follows);
``nvlm``: ``<box>(x1,y1),(x2,y2)</box>`` and ``(x,y)``, 0 to 1000 (Qwen-VL, arXiv 2308.12966)."""

_LARGEST: dict[CoordinateStyle, int] = {"mm1_5": 999, "nvlm": 1000}

_KEYS = {"<box>": "boxes", "<point>": "points"}
_NUM_COORDINATES = {"<box>": 4, "<point>": 2}
_UNITS = ("pixels", "unit", "thousandths")


class RegionSupply:
    """Hands out the regions of one row, in the order in which its texts are read."""

    def __init__(self, row: Mapping[str, Any], num_images: int, style: CoordinateStyle) -> None:
        """Read the row's ``boxes`` (each ``[left, top, right, bottom]``), ``points`` (each ``[x, y]``) and
        ``coordinates``, which says their unit: ``pixels`` of the row's only image, whose ``width`` and ``height`` it
        gives; ``unit``, shares of the image's sides; or ``thousandths`` of them.

        Args:
            row: the decoded JSON.
            num_images: of the row.
            style: how a region is written.

        Raises:
            ValueError: the regions cannot be used.
        """
        self._texts: dict[str, list[str]] = {}
        self._num_used = dict.fromkeys(_KEYS, 0)
        if not any(row.get(key) is not None for key in _KEYS.values()):
            return
        scales = _scales(row, num_images)
        for mark, key in _KEYS.items():
            regions = row.get(key) or []
            if not isinstance(regions, list):
                raise ValueError(f"{key} is no list")
            self._texts[mark] = [
                _write(_thousandths(region, f"{key}[{number}]", _NUM_COORDINATES[mark], scales), style)
                for number, region in enumerate(regions)
            ]

    def fill(self, text: str) -> str:
        """Put the next regions in the places of a text; it stays as it is if the row has no regions.

        Raises:
            ValueError: the text has more places than the row has regions.
        """
        for mark, supply in self._texts.items():
            pieces = text.split(mark)
            used = self._num_used[mark]
            self._num_used[mark] = used + len(pieces) - 1
            if self._num_used[mark] > len(supply):
                raise ValueError(f"the texts have more {mark} than the row has {_KEYS[mark]} ({len(supply)})")
            text = pieces[0] + "".join(region + piece for region, piece in zip(supply[used:], pieces[1:], strict=False))
        return text

    def finish(self) -> None:
        """Check that no region is left.

        Raises:
            ValueError: some are.
        """
        for mark, supply in self._texts.items():
            if self._num_used[mark] != len(supply):
                raise ValueError(
                    f"{self._num_used[mark]} {mark} in the texts, but {len(supply)} {_KEYS[mark]} in the row"
                )


def _scales(row: Mapping[str, Any], num_images: int) -> tuple[Fraction, Fraction]:
    """What makes thousandths of the row's x and y."""
    unit = row.get("coordinates")
    if unit not in _UNITS:
        raise ValueError(f"coordinates is {unit!r}, and must say the unit of boxes and points: {', '.join(_UNITS)}")
    if unit != "pixels":
        return (Fraction(1000), Fraction(1000)) if unit == "unit" else (Fraction(1), Fraction(1))
    if num_images != 1:
        raise ValueError(f"coordinates in pixels need one image, and the row has {num_images}; use unit")
    sides = [row.get(key) for key in ("width", "height")]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(
            f"coordinates in pixels need the image's width and height, which are {sides[0]} and {sides[1]}"
        )
    return Fraction(1000, sides[0]), Fraction(1000, sides[1])


def _thousandths(region: Any, where: str, num_coordinates: int, scales: tuple[Fraction, Fraction]) -> list[Fraction]:
    if not isinstance(region, Sequence) or isinstance(region, str) or len(region) != num_coordinates:
        raise ValueError(f"{where} is not a list of {num_coordinates} numbers")
    for value in region:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            raise ValueError(f"{where} holds {value!r}, not a number")
    # by their decimal spelling: 0.29 is 290 thousandths, not 289
    values = [Fraction(str(value)) * scales[number % 2] for number, value in enumerate(region)]
    if not all(0 <= value <= 1000 for value in values):
        raise ValueError(f"{where}={list(region)} lies outside the image")
    if num_coordinates == 4 and (values[0] > values[2] or values[1] > values[3]):
        raise ValueError(f"{where}={list(region)} has its right or bottom before its left or top")
    return values


def _write(thousandths: Sequence[Fraction], style: CoordinateStyle) -> str:
    numbers = [min(_LARGEST[style], int(value)) for value in thousandths]
    if style == "mm1_5":
        return f"[{', '.join(map(str, numbers))}]"
    if len(numbers) == 2:
        return f"({numbers[0]},{numbers[1]})"
    return "<box>({},{}),({},{})</box>".format(*numbers)
