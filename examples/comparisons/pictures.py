"""Pictures of several handwritten digits, from the scans of scikit-learn's ``load_digits``, and emoji of a package."""

import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy
from pages import Scans
from PIL import Image

GLYPH = (0.62, 0.9)
"""Smallest and largest height of a digit, as a share of its cell."""
EMOJI_SIDE = 48


def draw_digits(
    digits: str, columns: int, cell: tuple[int, int], scans: Scans, rng: numpy.random.Generator
) -> Image.Image:
    """Write digits row by row into the cells of a grid; dark on light, 8-bit grey.

    Args:
        digits: to write; the last row may be left short.
        columns: of the grid.
        cell: width and height of a cell, in pixels.
        scans: the handwriting, for training or held out.
        rng: chooses scans, sizes, places and greys.
    """
    width, height = cell
    ink = Image.new("L", (columns * width, -(-len(digits) // columns) * height))
    for place, digit in enumerate(digits):
        row, column = divmod(place, columns)
        glyph_height = round(height * rng.uniform(*GLYPH))
        glyph_width = min(width, round(glyph_height * rng.uniform(0.65, 0.9)))
        left = column * width + rng.uniform(0, width - glyph_width)
        top = row * height + rng.uniform(0, height - glyph_height)
        glyph = scans.draw(int(digit), glyph_width, glyph_height, rng)
        ink.paste(255, (round(left), round(top)), glyph)
    share = numpy.asarray(ink, numpy.float32) / 255
    paper, pen = rng.uniform(190, 255), rng.uniform(0, 70)
    return Image.fromarray(numpy.round(paper * (1 - share) + pen * share).astype(numpy.uint8))


def read_emoji(pictures: Path, codes: Mapping[str, str]) -> dict[str, Image.Image]:
    """Read emoji from a package, small and on white.

    Args:
        pictures: tarball with ``package/assets/CODE.webp``.
        codes: emoji's code points as file names have them -> anything.

    Returns:
        Code -> RGB image, of those that the package has.
    """
    found = {}
    with tarfile.open(pictures) as archive:
        for member in archive:
            code = plain_code(Path(member.name).stem)
            if member.name.endswith(".webp") and code in codes:
                content = archive.extractfile(member)
                assert content is not None, member.name
                drawn = Image.open(content).convert("RGBA").resize((EMOJI_SIDE, EMOJI_SIDE), Image.Resampling.BOX)
                white = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
                found[code] = Image.alpha_composite(white, drawn).convert("RGB")
    return dict(sorted(found.items()))


def plain_code(text: str) -> str:
    """Code points in small letters, without the one that asks for colours."""
    return "-".join(point for point in text.lower().split("-") if point != "fe0f")
