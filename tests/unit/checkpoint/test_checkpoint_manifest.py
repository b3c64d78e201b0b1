"""The manifest on plain files: every kind of damage to every file is found and named."""

import json
import logging
from pathlib import Path

import pytest
from damage import delete, empty, flip_bit, truncate

from megavlm.checkpoint import manifest

CONTENT = {"weights": b"0123456789" * 100, "one": b"1", "empty": b"", "sub/deeper/file": b"abc", ".hidden": b"xyz"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "iter_0000001"
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest.write_manifest(folder)
    return folder


def test_undamaged(folder: Path) -> None:
    assert manifest.find_damage(folder) is None
    assert manifest.is_complete(folder)
    assert set(manifest.read_manifest(folder)) == set(CONTENT)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


DAMAGES = {delete: "is missing", truncate: r"has \d+ bytes, and had \d+", empty: "has 0 bytes", flip_bit: "has changed"}


@pytest.mark.parametrize("name", [name for name, content in CONTENT.items() if content])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named(folder: Path, damage: object, name: str) -> None:
    damage(folder / name)
    with pytest.raises(ValueError, match=rf"{folder / name}: {DAMAGES[damage]}") as caught:
        manifest.verify(folder)
    assert "more file" not in str(caught.value)
    assert manifest.is_complete(folder) == (damage is flip_bit)  # which is cheap, and looks at sizes only


@pytest.mark.parametrize("damage", [delete, truncate, empty, flip_bit, append], ids=lambda damage: damage.__name__)
def test_damaged_manifest_is_named(folder: Path, damage: object) -> None:
    damage(folder / manifest.MANIFEST_NAME)
    if damage is append:  # of what JSON does not mind
        (folder / manifest.MANIFEST_NAME).write_text((folder / manifest.MANIFEST_NAME).read_text()[:-1] + "[]")
    with pytest.raises(ValueError, match=rf"{folder / manifest.MANIFEST_NAME}: is (missing|damaged)"):
        manifest.verify(folder)
    assert not manifest.is_complete(folder)


def test_every_flipped_bit_of_a_manifest_is_found(folder: Path) -> None:
    """Of its bytes that mean something; a flipped bit may turn white space into other white space."""
    path = folder / manifest.MANIFEST_NAME
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        for bit in (1, 16, 32):
            changed = bytearray(whole)
            changed[position] ^= bit
            path.write_bytes(changed)
            if _content(changed) != _content(whole):
                assert manifest.find_damage(folder) is not None, (position, bit)


def _content(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return "damaged"


def test_a_list_that_was_changed_by_hand_is_found(folder: Path) -> None:
    path = folder / manifest.MANIFEST_NAME
    tree = json.loads(path.read_bytes())
    del tree["files"]["one"]
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"manifest.json: is damaged \(its list does not have the checksum"):
        manifest.verify(folder)


def test_the_first_of_several_is_named_and_the_others_counted(folder: Path) -> None:
    (folder / "weights").unlink()
    (folder / "one").unlink()
    with pytest.raises(ValueError, match=r"/one: is missing.* 1 more file\(s\) are damaged too"):
        manifest.verify(folder)


def test_files_that_came_later_do_not_matter(folder: Path) -> None:
    (folder / "notes.txt").write_text("good one")
    assert manifest.find_damage(folder) is None


def test_a_later_file_is_no_part_of_the_list_but_a_folder_instead_of_a_file_is_damage(folder: Path) -> None:
    (folder / "one").unlink()
    (folder / "one").mkdir()
    with pytest.raises(ValueError, match="/one: is missing"):
        manifest.verify(folder)


def test_much_to_hash_is_announced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(manifest, "_LARGE_BYTES", 1000)
    monkeypatch.setattr(manifest, "_SECONDS_BETWEEN_HINTS", -1.0)
    with caplog.at_level(logging.INFO, logger="megavlm"):
        manifest.verify(folder)
    assert "GB to hash on this rank" in caplog.text
    assert " of 0.0 GB" in caplog.text


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_every_file_is_hashed_by_one_rank_and_the_work_is_even(num_ranks: int) -> None:
    sizes = {f"file{number}": 10 + number for number in range(20)} | {"large": 150}
    shares = manifest._share(sizes, num_ranks)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) <= max(150, sum(sizes.values()) / num_ranks + 30)
