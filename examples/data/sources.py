"""Makes sources for `megavlm data prepare` of the files in packages: captions, manuals, texts, formulas, maps.

Each function is given the folder or file that a package was unpacked to, and writes a folder of its own.
"""

import gzip
import html
import json
import random
import re
import shutil
import tarfile
import xml.etree.ElementTree
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
import scipy.ndimage
from PIL import Image

LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "pl": "Polish", "ja": "Japanese"}
"""Of the captions: folder in the package, and the name that the prompt uses."""

_SELECTOR = "fe0f"
_FORMULA = re.compile(r'<img class="math" src="([^"]+)" alt="([^"]*)"')
_FEWEST_PIXELS = 60  # of a region on a map


def write_captions(pictures: Path, labels: Path, target: Path, most: int, seed: int) -> int:
    """Emoji with their names in several languages, one language a picture.

    Args:
        pictures: tarball with ``package/assets/CODE.webp``.
        labels: tarball with ``package/LANGUAGE/data.json``.
        target: folder to make.
        most: captions.
        seed: of the choice.

    Returns:
        How many there are.
    """
    names: dict[str, dict[str, str]] = {}
    with tarfile.open(labels) as archive:
        for language in LANGUAGES:
            member = archive.extractfile(f"package/{language}/data.json")
            assert member is not None, language
            names[language] = {_code(entry["hexcode"]): entry["label"] for entry in json.load(member)}
    rows = []
    (target / "images").mkdir(parents=True, exist_ok=True)
    with tarfile.open(pictures) as archive:
        members = {_code(Path(name).stem): name for name in archive.getnames() if name.endswith(".webp")}
        codes = sorted(code for code in members if code in names["en"])
        for number, code in enumerate(_some(codes, most, seed)):
            language = list(LANGUAGES)[number % len(LANGUAGES)]
            caption = names[language].get(code)
            content = archive.extractfile(members[code])
            if caption is None or content is None:
                continue
            (target / f"images/{code}.webp").write_bytes(content.read())
            prompt = f"Name this picture in {LANGUAGES[language]}."
            rows.append({"image": f"images/{code}.webp", "caption": caption, "prompt": prompt})
    return _write(target / "rows.jsonl", rows)


def write_manual(package: Path, target: Path, most: int, seed: int) -> int:
    """Pages of GIMP's manual with their figures, as HTML; `--format html` reads them."""
    folder = package / "usr/share/gimp/2.0/help/en"
    pages = [path for path in sorted(folder.glob("*.html")) if "<img" in path.read_text(encoding="utf-8")]
    target.mkdir(parents=True, exist_ok=True)
    for path in _some(pages, most, seed):
        text = path.read_text(encoding="utf-8")
        (target / path.name).write_text(text, encoding="utf-8")
        for source in re.findall(r'<img[^>]* src="([^":?]+)"', text):
            image, copy = path.parent / source, target / source
            inside = copy.resolve().is_relative_to(target.resolve())
            if inside and image.is_file() and not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(image, copy)
    return len(list(target.glob("*.html")))


def write_dictionary(package: Path, target: Path, most: int, seed: int) -> int:
    """Pieces of the GNU Collaborative International Dictionary of English, as text files of about 200 entries."""
    with gzip.open(package / "usr/share/dictd/gcide.dict.dz") as file:
        text = file.read().decode("utf-8", "replace")
    entries = re.split(r"\n(?=\S)", text)
    pieces = ["\n".join(entries[start : start + 200]) for start in range(0, len(entries), 200)]
    target.mkdir(parents=True, exist_ok=True)
    for number, piece in enumerate(_some(pieces, most, seed)):
        (target / f"{number:05d}.txt").write_text(piece, encoding="utf-8")
    return len(list(target.glob("*.txt")))


def write_formulas(package: Path, target: Path, most: int, seed: int) -> int:
    """Typeset formulas of SymPy's documentation with the LaTeX that they were made of."""
    found: dict[Path, str] = {}
    for path in sorted((package / "usr/share/doc/python-sympy-doc/html").rglob("*.html")):
        for source, latex in _FORMULA.findall(path.read_text(encoding="utf-8", errors="replace")):
            found.setdefault((path.parent / html.unescape(source)).resolve(), html.unescape(latex))
    rows = []
    (target / "images").mkdir(parents=True, exist_ok=True)
    for path in _some(sorted(path for path in found if path.is_file()), most, seed):
        shutil.copyfile(path, target / "images" / path.name)
        prompt = "Write this formula in LaTeX."
        rows.append({"image": f"images/{path.name}", "transcription": found[path], "prompt": prompt})
    return _write(target / "rows.jsonl", rows)


def write_maps(package: Path, target: Path, most: int, seed: int) -> int:
    """Maps of KGeography: where a region is, and which region a box holds. Boxes are in pixels."""
    questions = []
    folder = package / "usr/share/kgeography"
    for path in sorted(folder.glob("*.kgm")):
        tree = xml.etree.ElementTree.parse(path).getroot()
        picture = folder / (tree.findtext("mapFile") or "")
        if picture.is_file():
            questions += [(picture, name, colour) for name, colour in _regions(tree)]
    rows = []
    (target / "images").mkdir(parents=True, exist_ok=True)
    pixels: dict[Path, numpy.ndarray] = {}
    for number, (picture, name, colour) in enumerate(_some(questions, most, seed)):
        if picture not in pixels:
            pixels[picture] = numpy.asarray(Image.open(picture).convert("RGB"))
            shutil.copyfile(picture, target / "images" / picture.name)
        box = region_box(pixels[picture], colour)
        if box is None:
            continue
        height, width = pixels[picture].shape[:2]
        texts = (f"Where is {name}?", "<box>") if number % 2 == 0 else ("Which region is in <box>?", name)
        rows.append(
            {
                "image": f"images/{picture.name}",
                "question": texts[0],
                "answer": texts[1],
                "boxes": [box],
                "coordinates": "pixels",
                "width": width,
                "height": height,
            }
        )
    return _write(target / "rows.jsonl", rows)


def region_box(pixels: numpy.ndarray, colour: tuple[int, int, int]) -> list[int] | None:
    """The box of the largest patch of a colour: left, top, right, bottom; None where there is hardly any.

    Args:
        pixels: ``[height, width, 3]`` uint8.
        colour: red, green, blue.
    """
    patches, _ = scipy.ndimage.label((pixels == numpy.array(colour, dtype=numpy.uint8)).all(axis=2))
    sizes = numpy.bincount(patches.ravel())[1:]
    if sizes.size == 0 or sizes.max() < _FEWEST_PIXELS:
        return None  # the map has no place for it, or a stray pixel
    rows, columns = numpy.nonzero(patches == sizes.argmax() + 1)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def _regions(tree: xml.etree.ElementTree.Element) -> Iterable[tuple[str, tuple[int, int, int]]]:
    for division in tree.iter("division"):
        name, colour = division.findtext("name"), division.find("color")
        if name and colour is not None and division.findtext("ignore") is None:
            red, green, blue = (int(colour.findtext(part) or 0) for part in ("red", "green", "blue"))
            yield name, (red, green, blue)


def _code(text: str) -> str:
    return "-".join(point for point in text.lower().split("-") if point != _SELECTOR)


def _some(values: list[Any], most: int, seed: int) -> list[Any]:
    """A random choice, in the order of the values."""
    chosen = sorted(random.Random(seed).sample(range(len(values)), min(most, len(values))))
    return [values[place] for place in chosen]


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
