"""The data set of shards: random access, other people's shards, and damage that is told, never passed on."""

import json
import pickle
import struct
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pytest
from made_up_source import llava, write_image, write_jsonl

from megavlm.data import DATASETS, Dataset, ImageRef
from megavlm.data.image import load_image
from megavlm.prepare import PrepareSettings, prepare

NUM_ROWS = 10


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Ten rows in shards of three; every second has an image."""
    rows = []
    for number in range(NUM_ROWS):
        write_image(tmp_path / f"{number}.png", 10 + number, 8, number)
        rows.append(llava(number, *[f"{number}.png"] * (number % 2)))
    settings = PrepareSettings(num_workers=0, samples_per_shard=3)
    prepare(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", settings)
    return tmp_path / "out"


def open_shards(path: Path, **settings: Any) -> Dataset:
    return DATASETS["shards"].model_validate({"path": path} | settings).build()


def write_tar(path: Path, samples: list[dict[str, bytes]], prefix: str = "k") -> Path:
    """A shard as other tools write it, with its index."""
    offsets = []
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            offsets.append(archive.offset)
            for name, content in sample.items():
                member = tarfile.TarInfo(f"{prefix}{number}.{name}")
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
        offsets.append(archive.offset)
    path.with_name(f"{path.name}.idx").write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
    return path


def test_samples_by_number(shards: Path) -> None:
    dataset = open_shards(shards)
    assert len(dataset) == NUM_ROWS
    for number in (9, 0, 3, 4, 2):
        key, conversation = dataset[number]
        assert key == f"{shards}/shard-{number // 3:06d}.tar[{number % 3}]"
        assert conversation.messages[1].text == f"it is caf\u00e9 {number}"
        sizes = [load_image(image.source).size for image in conversation.images]
        assert sizes == [(10 + number, 8)] * (number % 2)
    assert pickle.loads(pickle.dumps(dataset))[7] == dataset[7]
    assert len(open_shards(shards, limit=4)) == 4
    assert len(open_shards(shards / "shard-000003.tar")) == 1


def test_only_what_is_kept(shards: Path, tmp_path: Path) -> None:
    whole = open_shards(shards)
    names = [whole.sample_name(number) for number in (8, 1, 4)]  # type: ignore[attr-defined]
    assert names[0] == "shard-000002.tar[2]"
    (tmp_path / "keep.txt").write_text("".join(f"{name}\n" for name in names))
    dataset = open_shards(shards, keep=tmp_path / "keep.txt")
    assert [dataset[number] for number in range(3)] == [whole[1], whole[4], whole[8]]
    (tmp_path / "keep.txt").write_text("shard-000002.tar[2]\nshard-000002.tar[3]\n")
    with pytest.raises(ValueError, match=r"names 2 samples, and 1 of them .* not 'shard-000002.tar\[3\]'"):
        open_shards(shards, keep=tmp_path / "keep.txt")
    with pytest.raises(ValueError, match=r"dataset.keep=.*gone: cannot be read"):
        open_shards(shards, keep=tmp_path / "gone")


def test_shards_of_other_tools(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png", 6, 5)
    turns = [{"from": "human", "value": "<image>\n<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    named = {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]}
    named["messages"].append({"role": "assistant", "content": "a"})
    samples = [
        {"jpg": image, "txt": b"a caption"},
        {"txt": b"a document"},
        {"json": json.dumps(turns).encode(), "10.png": image, "2.png": write_image(tmp_path / "b.png", 3, 3)},
        {"x.png": image, "json": json.dumps(named).encode(), "mask.png": image},
    ]
    dataset = open_shards(write_tar(tmp_path / "a.tar", samples, prefix="folder.d/k"))
    caption, document, chat, parts = (dataset[number][1] for number in range(4))
    assert [message.text for message in caption.messages] == ["", "a caption"]
    assert document.is_document
    assert [load_image(ref.source).size for ref in chat.images] == [(3, 3), (6, 5)]
    assert isinstance(parts.messages[0].parts[0], ImageRef)


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        ({"png": b"x"}, r"a.tar\[0\]: has no .json and no .txt \(files: png\)"),
        ({"json": b"{"}, r"a.tar\[0\]: its .json is not valid"),
        ({"json": b"\xff"}, r"a.tar\[0\]: its .json is not UTF-8 text \(byte 0\)"),
        ({"json": b"[" * 5000}, r"a.tar\[0\]: its .json is not valid"),
        ({"json": b"3"}, r"a.tar\[0\]: the row is a number"),
        (
            {"json": b'{"text": "a <image>", "image": "/etc/x.png"}'},
            r"names the image '/etc/x.png', and the sample has no",
        ),
        ({"json": b'{"text": "a <image>", "image": "../0.png"}', "0.png": b"x"}, r"names the image '../0.png'"),
        ({"json": b'{"text": "a"}', "0.png": b"x"}, r"0 <image> placeholder\(s\) in the texts, but 1 image\(s\)"),
    ],
)
def test_bad_samples_say_where(tmp_path: Path, sample: dict[str, bytes], text: str) -> None:
    dataset = open_shards(write_tar(tmp_path / "a.tar", [sample]))
    with pytest.raises(ValueError, match=text):
        dataset[0]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda tar, idx: (tar[:-20000], idx), r"has \d+ bytes, and its index reaches to \d+. It was cut off"),
        (lambda tar, idx: (tar, idx[:-3]), r"has 29 bytes, and an index is two or more numbers of 8"),
        (lambda tar, idx: (tar, b""), r"has 0 bytes, and an index"),
        (lambda tar, idx: (tar, idx[:8] + idx[:8] + idx[16:]), r"its offsets are no places of a tar file"),
        (lambda tar, idx: (tar, b"\xff" * 8 + idx[8:]), r"its offsets are no places of a tar file"),
        (lambda tar, idx: (tar, None), r"shard-000001.tar: has no index shard-000001.tar.idx beside it"),
    ],
)
def test_damaged_shards_are_found_at_opening(shards: Path, damage: Any, text: str) -> None:
    tar, index = shards / "shard-000001.tar", shards / "shard-000001.tar.idx"
    new_tar, new_index = damage(tar.read_bytes(), index.read_bytes())
    tar.write_bytes(new_tar)
    index.unlink() if new_index is None else index.write_bytes(new_index)
    with pytest.raises(ValueError, match=text):
        open_shards(shards)
    dataset = open_shards(shards, bad_rows="skip")
    assert (len(dataset), dataset.num_bad_rows) == (NUM_ROWS - 3, 1)
    assert dataset[3][0].endswith("shard-000002.tar[0]")


@pytest.mark.parametrize("place", [0, 100, 512, 124, 156])
def test_a_damaged_header_is_told(shards: Path, place: int) -> None:
    tar = shards / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[place] ^= 0x5A
    tar.write_bytes(content)
    dataset = open_shards(shards)
    with pytest.raises(ValueError, match=r"shard-000001.tar\[0\]"):
        dataset[3]
    assert dataset[4][1].messages


def test_a_file_that_grows_under_its_reader_is_told(shards: Path) -> None:
    dataset = open_shards(shards)
    (shards / "shard-000002.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"the shard ends after 0 of the sample's \d+ bytes"):
        dataset[6]
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000002.tar\[0\]: cannot be read any more"):
        dataset[6]


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no .tar file. Make shards with `megavlm data prepare`"):
        open_shards(tmp_path)
    with pytest.raises(ValueError, match=r"gone: is no folder and no file"):
        open_shards(tmp_path / "gone")


def test_a_sparse_member_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [{"json": b'{"text": "a"}'}])
    content = bytearray(path.read_bytes())
    content[124:136] = b"77777777777\0"  # claims 8 GiB
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % int(numpy.frombuffer(bytes(content[:512]), dtype=numpy.uint8).sum())
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is no whole file of the shard"):
        open_shards(path)[0]
