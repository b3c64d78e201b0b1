"""Sources become shards: every row is there or listed, whatever the number of workers, and again after a stop."""

import base64
import json
import os
import re
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up_source import llava, write_image, write_jsonl

from megavlm.data import DATASETS, Conversation, Dataset, ImageRef, parse_conversation
from megavlm.prepare import FORMATS, FormatOptions, ImageLimits, PrepareSettings, prepare
from megavlm.prepare import run as run_module

IN_PROCESS = PrepareSettings(num_workers=0)


def open_shards(folder: Path, **settings: Any) -> Dataset:
    return DATASETS["shards"].model_validate({"path": folder} | settings).build()


def bad_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]


def plain(conversation: Conversation) -> list[Any]:
    """Roles, texts and the bytes of images."""
    found: list[Any] = [conversation.is_document]
    for message in conversation.messages:
        found.append((message.role, message.weight))
        for part in message.parts:
            if isinstance(part, str):
                found.append(part)
            elif part.source.startswith("data:"):
                found.append(base64.b64decode(part.source.partition(",")[2]))
            else:
                found.append(Path(part.source).read_bytes())
    return found


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture
def rows(tmp_path: Path) -> list[Any]:
    """Rows of many shapes; their images lie in ``source/``."""
    for number in range(4):
        write_image(tmp_path / f"source/pictures/{number}.png", 8 + number, 9, number)
    inline = "data:image/png;base64," + base64.b64encode(write_image(tmp_path / "other/x.png", 5, 5, 9)).decode()
    part = {"type": "image_url", "image_url": {"url": "pictures/3.png"}}
    unnamed = {"type": "image"}
    text = {"type": "text", "text": "<image> is text here"}
    return [
        llava(0, "pictures/0.png"),
        llava(1),
        llava(2, "pictures/1.png", "pictures/0.png", "pictures/1.png"),
        {"image": [inline], **{key: value for key, value in llava(3, "x").items() if key != "image"}},
        {
            "messages": [
                {"role": "user", "content": [part, text]},
                {"role": "assistant", "content": "yes", "weight": 0.5},
            ]
        },
        {
            "messages": [{"role": "user", "content": [unnamed, part, text]}, {"role": "assistant", "content": "no"}],
            "images": [{"path": "pictures/2.png"}],
        },
        {"caption": "a cat", "image": "file://" + str(tmp_path / "source/pictures/2.png")},
        {"text": "one <image> two", "image": "pictures/0.png"},
        {"texts": ["a", None, "b"], "images": [None, "pictures/1.png", None]},
        {
            "question": "where is <box>?",
            "answer": "at <point>",
            "image": str(tmp_path / "source/pictures/0.png"),
            "boxes": [[0, 0, 4, 9]],
            "points": [[1, 2]],
            "coordinates": "pixels",
            "width": 8,
            "height": 9,
        },
    ]


def test_samples_are_the_rows(tmp_path: Path, rows: list[Any]) -> None:
    source = write_jsonl(tmp_path / "source/rows.jsonl", rows)
    before = source.read_bytes()
    prepared = prepare(source, tmp_path / "out", PrepareSettings(num_workers=0, samples_per_shard=3))
    assert (prepared.num_samples, prepared.num_shards, prepared.num_bad_rows) == (10, 4, 0)
    assert prepared.num_images == 12
    dataset = open_shards(tmp_path / "out")
    assert len(dataset) == len(rows)
    for number, row in enumerate(rows):
        key, conversation = dataset[number]
        assert key == str(tmp_path / f"out/shard-{number // 3:06d}.tar[{number % 3}]")
        assert plain(conversation) == plain(parse_conversation(row, "row", source.parent))
    assert source.read_bytes() == before


def test_boxes_keep_every_style(tmp_path: Path, rows: list[Any]) -> None:
    source = write_jsonl(tmp_path / "source/rows.jsonl", rows[-1:])
    prepare(source, tmp_path / "out", IN_PROCESS)
    texts = [
        open_shards(tmp_path / "out", coordinate_style=style)[0][1].messages[0].text for style in ("mm1_5", "nvlm")
    ]
    assert texts == ["\nwhere is [0, 0, 500, 999]?", "\nwhere is <box>(0,0),(500,1000)</box>?"]


def test_workers_change_nothing(tmp_path: Path, rows: list[Any]) -> None:
    source = write_jsonl(tmp_path / "source/rows.jsonl", [*rows, "{broken", *rows])
    made = []
    for workers in (0, 1, 3):
        prepare(source, tmp_path / f"out{workers}", PrepareSettings(num_workers=workers, samples_per_shard=2))
        made.append(shard_bytes(tmp_path / f"out{workers}"))
    assert made[0] == made[1] == made[2]
    assert len([name for name in made[0] if name.endswith(".tar")]) == 11


def test_a_stopped_run_goes_on(tmp_path: Path, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "source/rows.jsonl", rows)
    settings = PrepareSettings(num_workers=0, samples_per_shard=2)
    prepare(source, tmp_path / "whole", settings)
    write_shard, written = run_module.write_shard, []

    def stops_at_third(folder: Path, number: int, *rest: Any) -> Any:
        if number == 2 and len(written) == 2:
            (folder / "shard-000002.tar.writing").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(number)
        return write_shard(folder, number, *rest)

    monkeypatch.setattr(run_module, "write_shard", stops_at_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", settings)
    (tmp_path / "out/shard-000001.tar").write_bytes(b"cut off")
    written.append(-1)
    prepared = prepare(source, tmp_path / "out", settings)
    assert written == [0, 1, -1, 1, 2, 3, 4]
    assert prepared.num_shards_found == 1
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    assert prepare(source, tmp_path / "out", settings).num_shards_found == 5
    assert written[-1] == 4


@pytest.mark.parametrize("change", ["settings", "source"])
def test_shards_of_another_state_are_not_mixed(tmp_path: Path, rows: list[Any], change: str) -> None:
    source = write_jsonl(tmp_path / "source/rows.jsonl", rows)
    prepare(source, tmp_path / "out", IN_PROCESS)
    settings = IN_PROCESS
    if change == "settings":
        settings = PrepareSettings(num_workers=0, limits=ImageLimits(min_image_side=2))
    else:
        write_jsonl(source, rows[1:])
    with pytest.raises(ValueError, match=r"out=.*: holds shards of other settings or of another state of the source"):
        prepare(source, tmp_path / "out", settings)


def test_every_bad_row_is_listed(tmp_path: Path) -> None:
    write_image(tmp_path / "good.png", 20, 20)
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:400])
    (tmp_path / "text.png").write_text("no image")
    rows = [
        llava(0, "good.png"),
        llava(1, "gone.png"),
        llava(2, "bad.png"),
        llava(3, "text.png"),
        "{oops",
        "[1]",
        llava(4, "https://example.org/a.png"),
        {"conversations": "none"},
        '{"conversations": [' + '"x",' * 400 + '"y"]}',
        llava(5, "data:image/png;base64,!!"),
        llava(6),
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = prepare(
        source, tmp_path / "out", PrepareSettings(num_workers=0, options=FormatOptions(max_row_bytes=1000))
    )
    listed = bad_rows(tmp_path / "out")
    assert [(row["where"], row["reason"]) for row in listed] == [
        ("rows.jsonl:2", "image_missing"),
        ("rows.jsonl:3", "image_unreadable"),
        ("rows.jsonl:4", "image_unreadable"),
        ("rows.jsonl:5", "row_malformed"),
        ("rows.jsonl:6", "row_malformed"),
        ("rows.jsonl:7", "row_malformed"),
        ("rows.jsonl:8", "row_malformed"),
        ("rows.jsonl:9", "row_too_long"),
        ("rows.jsonl:10", "image_unreadable"),
    ]
    assert "remote address" in listed[5]["message"]
    assert (prepared.num_samples, prepared.num_bad_rows, prepared.num_items) == (2, 9, 11)
    summary = json.loads((tmp_path / "out/prepare.json").read_text())
    assert summary["reasons"] == {"row_malformed": 4, "image_unreadable": 3, "image_missing": 1, "row_too_long": 1}
    assert len(open_shards(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("limits", "reason", "text"),
    [
        (ImageLimits(max_image_pixels=399), "image_too_large", r"20 x 20 = 400 pixels"),
        (ImageLimits(max_image_bytes=10), "image_too_large", r"has \d+ bytes; --max-image-bytes=10"),
        (ImageLimits(min_image_side=21), "image_too_small", r"has 20 x 20 pixels; --min-image-side=21"),
    ],
)
def test_limits_of_images(tmp_path: Path, limits: ImageLimits, reason: str, text: str) -> None:
    write_image(tmp_path / "a.png", 20, 20)
    source = write_jsonl(tmp_path / "rows.jsonl", [llava(0, "a.png"), llava(1)])
    prepare(source, tmp_path / "out", PrepareSettings(num_workers=0, limits=limits))
    [row] = bad_rows(tmp_path / "out")
    assert row["reason"] == reason
    assert re.search(text, row["message"]), row["message"]


@pytest.mark.parametrize("drops", [True, False])
def test_documents_may_lose_an_image(tmp_path: Path, drops: bool) -> None:
    write_image(tmp_path / "a.png")
    row = {"texts": ["one", None, None, "two"], "images": [None, "a.png", "gone.png", None]}
    source = write_jsonl(tmp_path / "rows.jsonl", [row, {"text": "more"}])
    settings = PrepareSettings(num_workers=0, limits=ImageLimits(drops_bad_images=drops))
    prepared = prepare(source, tmp_path / "out", settings)
    [bad] = bad_rows(tmp_path / "out")
    assert (bad["where"], bad["reason"], bad["is_image"]) == ("rows.jsonl:1", "image_missing", drops)
    assert (prepared.num_samples, prepared.num_bad_rows, prepared.num_bad_images) == ((2, 0, 1) if drops else (1, 1, 0))
    if drops:
        parts = open_shards(tmp_path / "out")[0][1].messages[0].parts
        assert [isinstance(part, ImageRef) for part in parts] == [False, True, False]


def test_nothing_usable_is_an_error_that_lists_rows(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", ["{", "[]"])
    with pytest.raises(ValueError, match=r"none of its 2 rows can be used(.|\n)*rows.jsonl:1: is not valid JSON"):
        prepare(source, tmp_path / "out", IN_PROCESS)


def test_refusals(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in/rows.jsonl", [llava(0)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    for change, text in (
        ({"samples_per_shard": 0}, r"--samples-per-shard=0: must be at least 1"),
        ({"num_workers": -1}, r"--workers=-1: must be at least 0"),
        ({"format": "parquet"}, r"--format=parquet: is not known. Choose auto, llava"),
        ({"options": FormatOptions(image_root=tmp_path / "none")}, r"--image-root=.*: is no folder"),
    ):
        with pytest.raises(ValueError, match=text):
            prepare(source, tmp_path / "out", PrepareSettings(**change))
    with pytest.raises(ValueError, match=r"source=.*gone: is no file and no folder"):
        prepare(tmp_path / "gone", tmp_path / "out", IN_PROCESS)
    with pytest.raises(ValueError, match=r"out=.*full: is not empty"):
        prepare(source, tmp_path / "full", IN_PROCESS)
    with pytest.raises(ValueError, match=r"out=.*: lies in source="):
        prepare(tmp_path / "in", tmp_path / "in/out", IN_PROCESS)


def test_the_files_of_energon(tmp_path: Path, rows: list[Any]) -> None:
    source = write_jsonl(tmp_path / "source/rows.jsonl", ["{", *rows])
    out = tmp_path / "out"
    prepare(source, out, PrepareSettings(num_workers=0, samples_per_shard=1))
    counts = json.loads((out / ".nv-meta/.info.json").read_text())["shard_counts"]
    assert counts == {f"shard-{number:06d}.tar": 1 for number in range(1, 11)}  # the first has no usable row
    assert yaml.safe_load((out / ".nv-meta/split.yaml").read_text())["split_parts"]["train"] == list(counts)
    assert yaml.safe_load((out / ".nv-meta/dataset.yaml").read_text())["__class__"] == "CrudeWebdataset"
    with tarfile.open(out / "shard-000003.tar") as archive:
        assert archive.getnames() == [f"000003_000000.{name}" for name in ("json", "0.png", "1.png", "2.png")]
        row = json.load(archive.extractfile("000003_000000.json"))  # type: ignore[arg-type]
        assert row["image"] == ["0.png", "1.png", "2.png"]
        assert row["origin"] == "rows.jsonl:4"
    assert not os.listdir(out / ".nv-meta").count("index.sqlite.writing")


def test_every_format_is_named_in_the_help() -> None:
    assert set(FORMATS) >= {"llava", "sharegpt", "openai", "imagefolder", "html", "mmc4", "obelics", "text"}


def _is_killed(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_told(tmp_path: Path, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "source/rows.jsonl", rows)
    monkeypatch.setattr(run_module, "write_shard", _is_killed)
    with pytest.raises(ValueError, match=r"--workers=1: one of them was ended from outside"):
        prepare(source, tmp_path / "out", PrepareSettings(num_workers=1))
    monkeypatch.undo()
    assert prepare(source, tmp_path / "out", PrepareSettings(num_workers=1)).num_samples == len(rows)


def test_a_full_disk_is_told(tmp_path: Path, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    source = write_jsonl(tmp_path / "source/rows.jsonl", rows)
    monkeypatch.setattr(run_module, "write_shard", fails)
    with pytest.raises(ValueError, match=r"out=.*: cannot be written \(.*No space left on device\). Make room"):
        prepare(source, tmp_path / "out", IN_PROCESS)
