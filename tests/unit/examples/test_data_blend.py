"""The blend's sources, from made-up packages of the same form: no network."""

import gzip
import importlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[3] / "examples" / "data"

sys.path.insert(0, str(FOLDER))  # as Python does where the script is run
build_blend = importlib.import_module("build_blend")
sources = importlib.import_module("sources")
debian = importlib.import_module("debian")
sys.path.remove(str(FOLDER))


def picture(path: Path, width: int = 40, height: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (9, 99, 199)).save(path)


def tarball(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """What the packages would be unpacked to."""
    folder = tmp_path / "packages"
    stream = io.BytesIO()
    Image.new("RGBA", (32, 32), (200, 0, 0, 128)).save(stream, "WEBP")
    codes = [f"1f60{number}" for number in range(6)]
    folder.mkdir()
    tarball(folder / "pictures.tgz", {f"package/assets/{code}-fe0f.webp": stream.getvalue() for code in codes})
    entries = [{"hexcode": code.upper(), "label": f"face {code}"} for code in codes]
    labels = {
        f"package/{language}/data.json": json.dumps(
            [{**entry, "label": f"{language} {entry['label']}"} for entry in entries]
        ).encode()
        for language in sources.LANGUAGES
    }
    tarball(folder / "labels.tgz", labels)
    manual = folder / "gimp-help-en/usr/share/gimp/2.0/help/en"
    picture(manual / "images/shot.png", 50, 40)
    picture(manual / "images/icon.png", 8, 8)
    (manual / "a.html").write_text(
        '<body><p>Before <img alt="x" src="images/shot.png"/> after <img src="images/icon.png">'
        '<img src="../../escape.png"></p></body>'
    )
    (manual / "plain.html").write_text("<p>no picture</p>")
    dictionary = folder / "dict-gcide/usr/share/dictd"
    dictionary.mkdir(parents=True)
    text = "".join(f"Word{number} \\Word\\, n.\n   Its meaning is {number}.\n\n" for number in range(450))
    (dictionary / "gcide.dict.dz").write_bytes(gzip.compress(text.encode()))
    formulas = folder / "python-sympy-doc/usr/share/doc/python-sympy-doc/html"
    picture(formulas / "_images/math/1.png", 60, 20)
    (formulas / "modules").mkdir()
    (formulas / "modules/x.html").write_text('<img class="math" src="../_images/math/1.png" alt="a &lt; b"/>')
    maps = folder / "kgeography-data/usr/share/kgeography"
    maps.mkdir(parents=True)
    pixels = numpy.zeros((60, 80, 3), dtype=numpy.uint8)
    pixels[10:30, 20:50] = (255, 0, 0)
    pixels[50, 70] = (255, 0, 0)  # a stray one
    pixels[40:55, 5:25] = (0, 255, 0)
    Image.fromarray(pixels).save(maps / "land.png")
    division = "<division><name>{}</name>{}<color><red>{}</red><green>{}</green><blue>0</blue></color></division>"
    divisions = [
        ("North", "", 255, 0),
        ("South", "", 0, 255),
        ("Sea", "<ignore>yes</ignore>", 0, 0),
        ("None", "", 1, 2),
    ]
    content = "".join(division.format(*one) for one in divisions)
    (maps / "land.kgm").write_text(f"<map><mapFile>land.png</mapFile>{content}</map>")
    return folder


def test_all_five_become_shards(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_blend, "unpack", lambda name, folder: folder / name)
    files = {build_blend.PICTURES: "pictures.tgz", build_blend.LABELS: "labels.tgz"}
    monkeypatch.setattr(build_blend, "download", lambda package, folder: folder / files[package])
    for _ in range(2):  # what is there stays
        build_blend.main(["--out", str(tmp_path), "--workers", "0"])
    counts = {
        name: json.loads((tmp_path / name / "prepare.json").read_text())
        for name in ("captions", "manual", "dictionary", "formulas", "maps")
    }
    assert {name: one["num_samples"] for name, one in counts.items()} == {
        "captions": 6,
        "manual": 1,
        "dictionary": 3,
        "formulas": 1,
        "maps": 2,
    }
    assert counts["manual"]["num_images"] == 1
    assert counts["manual"]["reasons"] == {"image_too_small": 1, "image_missing": 1}
    captions = rows(tmp_path / "sources/captions")
    assert [row["caption"].split()[0] for row in captions] == list(sources.LANGUAGES)
    assert captions[2]["prompt"] == "Name this picture in French."
    assert rows(tmp_path / "sources/formulas")[0]["transcription"] == "a < b"
    assert rows(tmp_path / "sources/maps") == [
        {
            "image": "images/land.png",
            "question": question,
            "answer": answer,
            "boxes": [box],
            "coordinates": "pixels",
            "width": 80,
            "height": 60,
        }
        for question, answer, box in (
            ("Where is North?", "<box>", [20, 10, 50, 30]),
            ("Which region is in <box>?", "South", [5, 40, 25, 55]),
        )
    ]


def test_the_choice_depends_on_the_seed_alone(packages: Path, tmp_path: Path) -> None:
    chosen = []
    for number, seed in enumerate((1, 1, 2, 3)):
        folder = tmp_path / str(number)
        sources.write_captions(packages / "pictures.tgz", packages / "labels.tgz", folder, 3, seed)
        chosen.append([row["image"] for row in rows(folder)])
    assert chosen[0] == chosen[1]
    assert len({tuple(names) for names in chosen}) > 1


def test_wrong_names_and_missing_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"--only=poems: is none of captions, manual"):
        build_blend.main(["--out", str(tmp_path), "--only", "poems"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"some-package: needs apt-get, which is not here"):
        debian.unpack("some-package", tmp_path / "new")
    (tmp_path / "some-package").mkdir()
    assert debian.unpack("some-package", tmp_path) == tmp_path / "some-package"
