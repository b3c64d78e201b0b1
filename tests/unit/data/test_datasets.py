"""Data files: random access, and every bad row found at opening."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
from small_data import chat

from megavlm.data import DATASETS, Dataset, DatasetConfig, Message

WriteRows = Callable[..., Path]

KEY_OF_FIFTH = {"jsonl": "{path}:5", "json": "{path}[4]"}


@pytest.fixture(params=list(KEY_OF_FIFTH))  # files of rows; tests/unit/prepare has shards
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def write_kind(kind: str, tmp_path: Path, write_rows: WriteRows) -> Callable[[list[Any]], Path]:
    """Write rows in the way of the kind under test."""

    def write(rows: list[Any]) -> Path:
        if kind == "jsonl":
            return write_rows(rows)
        (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
        return tmp_path / "rows.json"

    return write


def open_dataset(kind: str, path: Path, **settings: Any) -> Dataset:
    return DATASETS[kind].model_validate({"path": path} | settings).build()


def question(dataset: Dataset, index: int) -> str:
    return dataset[index][1].messages[0].text


def test_every_kind_is_in_the_union() -> None:
    adapter = pydantic.TypeAdapter(DatasetConfig)
    for name, config_class in DATASETS.items():
        assert isinstance(adapter.validate_python({"kind": name, "path": "x"}), config_class)


def test_rows_by_number(kind: str, write_kind: Callable[[list[Any]], Path]) -> None:
    path = write_kind([chat(f"caf\u00e9 {n}" * (n % 7 + 1)) for n in range(50)])
    dataset = open_dataset(kind, path)
    assert len(dataset) == 50
    for index in (49, 0, 17, 4):
        assert question(dataset, index) == f"caf\u00e9 {index}" * (index % 7 + 1)
    assert dataset[4][0] == KEY_OF_FIFTH[kind].format(path=path)
    assert (dataset.num_bad_rows, dataset.bad_rows) == (0, [])
    again = pickle.loads(pickle.dumps(dataset))
    assert again[17] == dataset[17]


def test_images_are_looked_for_beside_the_file_or_under_the_root(
    kind: str, write_kind: Callable[[list[Any]], Path], write_image: Callable[..., Path], tmp_path: Path
) -> None:
    write_image("a.png", 2, 2)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "pictures" / "a.png")
    path = write_kind([chat("<image>", images=["a.png"])])
    with pytest.raises(ValueError, match=rf"the image {tmp_path}/a.png is missing"):
        open_dataset(kind, path)
    dataset = open_dataset(kind, path, image_root=tmp_path / "pictures")
    assert dataset[0][1].images[0].source == str(tmp_path / "pictures" / "a.png")


def test_all_bad_rows_are_counted_and_ten_are_listed(kind: str, write_kind: Callable[[list[Any]], Path]) -> None:
    path = write_kind([{"bad": n} if n % 2 else chat() for n in range(30)])
    with pytest.raises(ValueError, match=r"15 of 30 rows cannot be used. Mend them, or .*bad_rows=skip") as caught:
        open_dataset(kind, path)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 11
    assert all("neither conversations nor messages" in line for line in lines[:10])
    assert KEY_OF_FIFTH[kind].replace("5", "6").replace("[4]", "[5]").format(path=path) in lines[2]
    assert lines[10].strip() == "... and 5 more"


def test_bad_rows_can_be_left_out(kind: str, write_kind: Callable[[list[Any]], Path]) -> None:
    path = write_kind([{"bad": n} if n % 2 else chat(f"row {n}") for n in range(30)])
    dataset = open_dataset(kind, path, bad_rows="skip")
    assert len(dataset) == 15
    assert [question(dataset, index) for index in range(3)] == ["row 0", "row 2", "row 4"]
    assert dataset[2][0] == KEY_OF_FIFTH[kind].format(path=path)
    assert dataset.num_bad_rows == 15
    assert len(dataset.bad_rows) == 10


def test_a_limit_reads_only_the_beginning(kind: str, write_kind: Callable[[list[Any]], Path]) -> None:
    path = write_kind([chat(f"row {n}") for n in range(5)] + [{"bad": 1}])
    dataset = open_dataset(kind, path, limit=3)
    assert [question(dataset, index) for index in range(len(dataset))] == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_nothing_usable_is_an_error(kind: str, write_kind: Callable[[list[Any]], Path], policy: str) -> None:
    with pytest.raises(ValueError, match=r"has no usable row \(0 rows, 0 bad\)"):
        open_dataset(kind, write_kind([]), bad_rows=policy)
    with pytest.raises(ValueError, match=r"1 bad|1 of 1 rows"):
        open_dataset(kind, write_kind([{"bad": 1}]), bad_rows=policy)


def test_a_missing_file(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"dataset.path={tmp_path}/no: cannot be read .No such file.*Check the path"):
        open_dataset(kind, tmp_path / "no")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"conversations": [', "is not valid JSON"),
        ("hello", "is not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(chat("\ud800")), "message 1 holds the broken character"),
        (json.dumps(chat("<image>", images=["gone.png"])), "the image .*gone.png is missing"),
    ],
)
def test_a_damaged_line(write_rows: WriteRows, line: str, what: str) -> None:
    path = write_rows([chat(), chat(), line])
    with pytest.raises(ValueError, match=rf"1 of 3 rows(.|\n)*rows.jsonl:3: .*{what}"):
        open_dataset("jsonl", path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(chat()).encode() + b'\n{"a": "\xff\xfe\xfd"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: is not UTF-8 text"):
        open_dataset("jsonl", tmp_path / "rows.jsonl")


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    lines = [json.dumps(chat(f"row {n}")) for n in range(3)]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{lines[0]}\r\n\n  \n{lines[1]}\n\n{lines[2]}".encode())
    dataset = open_dataset("jsonl", tmp_path / "rows.jsonl")
    assert [question(dataset, index) for index in range(len(dataset))] == ["row 0", "row 1", "row 2"]
    assert dataset[1][0].endswith("rows.jsonl:4")


def test_the_other_kind_is_named(write_rows: WriteRows, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([chat()]))
    (tmp_path / "mark.json").write_bytes(b"\xef\xbb\xbf [{}]")
    with pytest.raises(ValueError, match="Use kind=json"):
        open_dataset("jsonl", tmp_path / "mark.json")
    with pytest.raises(ValueError, match=r"is one JSON list, not one object a line. Use kind=json"):
        open_dataset("jsonl", tmp_path / "list.json")
    with pytest.raises(ValueError, match=r"is not valid JSON .*needs kind=jsonl"):
        open_dataset("json", write_rows([chat(), chat()]))
    with pytest.raises(ValueError, match=r"holds one dict, not a list of rows. .*needs kind=jsonl"):
        open_dataset("json", write_rows([chat()]))


def test_a_file_that_changes_while_training(write_rows: WriteRows) -> None:
    path = write_rows([chat(), chat()])
    dataset = open_dataset("jsonl", path)
    assert dataset[1][1].messages[1] == Message("assistant", ("A cat.",))
    path.write_text("changed\n" * 100)
    with pytest.raises(ValueError, match=r"rows.jsonl:2: is not valid JSON"):
        dataset[1]
    path.unlink()
    with pytest.raises(ValueError, match=r"rows.jsonl:2: cannot be read any more"):
        dataset[1]


def test_a_wrong_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="Input should be 'error' or 'skip'"):
        DATASETS["jsonl"].model_validate({"path": "x", "bad_rows": "ignore"})
