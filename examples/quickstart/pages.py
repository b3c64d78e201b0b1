"""Pages of handwritten two-digit numbers, and what can be asked about them.

The handwriting is real: the 1,797 digit scans of scikit-learn's ``load_digits`` (8 x 8 pixels, 17 grey levels).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

GRIDS = [(columns, rows) for columns in range(1, 7) for rows in range(1, 7) if columns * rows <= 6]
"""Columns and rows of a page: every grid that dynamic tiling can choose with up to six tiles."""
SINGLE_SIDE = (32, 43)
"""Shortest and longest side in pixels of a page of one number. A square page above 2 * 32 * 32 pixels would be cut into
2 x 2 tiles (with tiles of 32 pixels), so these stay below."""
CELL_SIDE = (36, 60)
"""Shortest and longest side in pixels of a cell of any other page."""
STRETCH = 0.04
"""Most by which width and height differ from a whole number of square cells; tiling still chooses the page's grid."""
LINE_WIDTH = 2
"""Pixels of the lines between cells."""
LINE_INK = 110
"""How dark they are; 255 is the pen."""

HELD_OUT_SHARE = 0.2
MOST_TURN = 0.2
"""Radians by which a training scan is turned at most, either way."""
MOST_SLANT = 0.3
"""Width by which a training scan leans at most, either way, as a share of its height."""
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "single": ("What number is this?", "Read the number.", "Which number is on the page?"),
    "tile": ("Which number is in tile {k}?", "What does tile {k} show?", "Read tile {k}."),
    "order": ("What is the {nth} number?", "Read the {nth} number on the page."),
    "last": ("What is the last number?", "Which number comes last?"),
    "cell": ("Which number is in row {r}, column {c}?", "Read the number at row {r}, column {c}."),
    "corner": ("Which number is at the {where}?", "Read the number at the {where}."),
    "row": ("Read row {r} from left to right.", "Which numbers are in row {r}?"),
    "column": ("Read column {c} from top to bottom.", "Which numbers are in column {c}?"),
    "all": ("Read all the numbers in order.", "Which numbers are on the page?"),
}
"""Kind of question -> the ways to ask it."""
KIND_WEIGHTS = {"single": 1, "tile": 3, "order": 2, "last": 1, "cell": 3, "corner": 2, "row": 2, "column": 2, "all": 1}


def grid_weights(most_numbers: int) -> np.ndarray:
    """Return how often each of ``GRIDS`` is drawn (sums to 1), for pages of up to ``most_numbers``.

    Grids of several rows and columns come three times as often as a single row or column: only they can be asked about
    rows and columns, and there are few of them.
    """
    weights = [
        0.0 if columns * rows > most_numbers else 3.0 if min(columns, rows) > 1 else 2.0 if columns == rows else 1.0
        for columns, rows in GRIDS
    ]
    return np.array(weights) / sum(weights)


@dataclass(frozen=True)
class Page:
    """A grid of numbers, each of two digits, in reading order."""

    columns: int
    rows: int
    numbers: tuple[str, ...]

    @property
    def grid(self) -> list[tuple[str, ...]]:
        """The numbers row by row."""
        return [self.numbers[start : start + self.columns] for start in range(0, len(self.numbers), self.columns)]


class Scans:
    """The digit scans of one side of the division.

    Attributes:
        indices: for each digit, the numbers of its scans in ``load_digits``.
    """

    def __init__(self, *, held_out: bool) -> None:
        scans = load_digits()
        self._held_out = held_out
        self._ink = (scans.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], 255 is full ink
        self.indices: list[np.ndarray] = []
        for digit in range(10):
            shuffled = np.random.default_rng(digit).permutation(np.flatnonzero(scans.target == digit))
            cut = round(len(shuffled) * HELD_OUT_SHARE)
            self.indices.append(shuffled[:cut] if held_out else shuffled[cut:])

    def draw(self, digit: int, width: int, height: int, rng: np.random.Generator) -> Image.Image:
        """Return a random scan of ``digit``, scaled to ``width`` x ``height`` pixels; 8-bit grey, 255 is full ink.

        Scans for training are also turned and slanted a little, because there are few; held-out ones are as written.
        """
        scan = Image.fromarray(self._ink[rng.choice(self.indices[digit])])
        angle, slant = rng.uniform(-1, 1, 2) * ((0, 0) if self._held_out else (MOST_TURN, MOST_SLANT))
        # Maps a pixel of the glyph to a pixel of the scan, centre on centre. The glyph is as large as 9 x 9 pixels of
        # the scan, which has 8 x 8, so that turning cuts hardly anything off.
        across = 9 / width * np.cos(angle), 9 / width * (slant - np.sin(angle))
        down = 9 / height * np.sin(angle), 9 / height * np.cos(angle)
        affine = [value for x, y in (across, down) for value in (x, y, 4 - (x * width + y * height) / 2)]
        return scan.transform((width, height), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)


def draw_ink(page: Page, scans: Scans, rng: np.random.Generator) -> Image.Image:
    """Write the page's numbers, each somewhere in its cell; 8-bit grey, 255 is full ink."""
    single = len(page.numbers) == 1
    side = rng.integers(*(SINGLE_SIDE if single else CELL_SIDE), endpoint=True)
    width, height = np.round(side * np.array([page.columns, page.rows]) * rng.uniform(1 - STRETCH, 1 + STRETCH, 2))
    cell_width, cell_height = width / page.columns, height / page.rows
    ink = Image.new("L", (int(width), int(height)))
    lines = ImageDraw.Draw(ink)
    for column in range(1, page.columns):
        lines.line([(column * cell_width, 0), (column * cell_width, height)], fill=LINE_INK, width=LINE_WIDTH)
    for row in range(1, page.rows):
        lines.line([(0, row * cell_height), (width, row * cell_height)], fill=LINE_INK, width=LINE_WIDTH)
    for index, number in enumerate(page.numbers):
        row, column = divmod(index, page.columns)
        glyph_height = round(cell_height * rng.uniform(0.55, 0.8))
        glyph_widths = np.round(np.minimum(glyph_height * rng.uniform(0.6, 0.85, 2), 0.46 * cell_width)).astype(int)
        free_width, free_height = cell_width - glyph_widths.sum(), cell_height - glyph_height
        left = column * cell_width + free_width * rng.uniform(0.1, 0.9)
        top = row * cell_height + free_height * rng.uniform(0.1, 0.9, 2)  # digits of one number are not quite level
        top[1] = top[0] + 0.15 * (top[1] - top[0])
        for digit, glyph_width, glyph_top in zip(number, glyph_widths, top, strict=True):
            glyph = scans.draw(int(digit), int(glyph_width), glyph_height, rng)
            ink.paste(255, (round(left), round(glyph_top)), glyph)
            left += glyph_width
    return ink


def draw_page(page: Page, scans: Scans, rng: np.random.Generator) -> Image.Image:
    """Draw the page with a pen and on paper of random colours; RGB."""
    share = np.asarray(draw_ink(page, scans, rng), np.float32)[..., None] / 255  # [H, W, 1]
    paper, pen = rng.uniform(170, 255, 3), rng.uniform(0, 90, 3)
    return Image.fromarray(np.round(paper * (1 - share) + pen * share).astype(np.uint8))


def questions_about(page: Page) -> dict[str, list[tuple[dict[str, str], str]]]:
    """Return everything that can be asked: kind -> (fields of the question's text, answer).

    Rows and columns are asked about only where a page has several of both.
    """
    if len(page.numbers) == 1:
        return {"single": [({}, page.numbers[0])]}
    grid, numbers = page.grid, page.numbers
    possible: dict[str, list[tuple[dict[str, str], str]]] = {
        "tile": [({"k": str(index)}, number) for index, number in enumerate(numbers, 1)],
        "order": [({"nth": nth}, number) for nth, number in zip(ORDINALS, numbers, strict=False)],
        "last": [({}, numbers[-1])],
        "all": [({}, " ".join(numbers))],
    }
    if page.rows == 1:
        possible["corner"] = [({"where": "left end"}, numbers[0]), ({"where": "right end"}, numbers[-1])]
    elif page.columns == 1:
        possible["corner"] = [({"where": "top"}, numbers[0]), ({"where": "bottom"}, numbers[-1])]
    else:
        possible["corner"] = [
            ({"where": f"{height} {side}"}, grid[row][column])
            for height, row in (("top", 0), ("bottom", -1))
            for side, column in (("left", 0), ("right", -1))
        ]
        possible["cell"] = [
            ({"r": str(r), "c": str(c)}, number) for r, row in enumerate(grid, 1) for c, number in enumerate(row, 1)
        ]
        possible["row"] = [({"r": str(r)}, " ".join(row)) for r, row in enumerate(grid, 1)]
        columns = zip(*grid, strict=True)
        possible["column"] = [({"c": str(c)}, " ".join(column)) for c, column in enumerate(columns, 1)]
    return possible


def draw_question(page: Page, rng: np.random.Generator) -> tuple[str, str, str]:
    """Return the kind, the text and the answer of a random question about ``page``."""
    possible = questions_about(page)
    weights = np.array([KIND_WEIGHTS[kind] for kind in possible], float)
    kind = str(rng.choice(list(possible), p=weights / weights.sum()))
    fields, answer = possible[kind][rng.integers(len(possible[kind]))]
    text = QUESTIONS[kind][rng.integers(len(QUESTIONS[kind]))]
    return kind, text.format(**fields), answer
