"""Scores on disk: a torn line is cut off, anything else that is wrong is told."""

import json
from pathlib import Path

import pytest

from megavlm.filters.score_file import ScoreFile
from megavlm.filters.sharing import Result, Team, in_batches, shared


def write(folder: Path, *numbers: int) -> bytes:
    file = ScoreFile(folder, {"filter": "x"})
    file.open()
    file.add({"number": number, "score": number / 3} for number in numbers)
    file.close()
    return file.path.read_bytes()


@pytest.mark.parametrize("lost", [1, 10, 27])
def test_a_torn_line_is_cut_off(tmp_path: Path, lost: int) -> None:
    whole = write(tmp_path, 4, 2, 7)
    (tmp_path / "scores.jsonl").write_bytes(whole[:-lost])
    file = ScoreFile(tmp_path, {"filter": "x"})
    assert list(file.open()) == [4, 2]
    file.add([{"number": 7, "score": 7 / 3}])
    file.close()
    assert file.path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{}\n", r"scores.jsonl:1: is no score \(KeyError: 'settings'\)"),
        (b'{"settings": {"filter": "x"}}\n[]\n', r"scores.jsonl:2: is no score \(TypeError"),
        (b'{"settings": {"filter": "x"}}\n\xff\n', r"scores.jsonl:2: is no score \(UnicodeDecodeError"),
        (b'{"settings": {"filter": "y"}}\n', r"holds scores with other settings: filter was 'y' and is 'x' now"),
    ],
)
def test_files_of_something_else(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "scores.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        ScoreFile(tmp_path, {"filter": "x"}).open()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"--out=.*out: cannot be written"):
        ScoreFile(tmp_path / "out", {}).open()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_teams_of_every_size_do_the_same_work(size: int) -> None:
    """One member's view, with the others' results filled in by what they would compute."""
    done = {0, 1, 2, 3, 9}
    batches = in_batches(range(11), 2, done)
    assert batches == [[4, 5], [6, 7], [8, 9], [10]]
    found = {}
    for rank in range(size):
        rounds: list[list[list[Result]]] = []
        team = Team(rank, size, lambda mine, rounds=rounds: rounds.append([mine]) or [mine])  # type: ignore[misc]
        list(shared(batches, list, lambda work: [{"number": number} for number in work], team))
        assert len(rounds) == -(-len(batches) // size)
        for place, [mine] in enumerate(rounds):
            if mine:
                found[place * size + rank] = [entry["number"] for entry in mine]
    assert [found[place] for place in range(len(batches))] == batches


def test_what_is_written_is_json(tmp_path: Path) -> None:
    lines = write(tmp_path, 1).splitlines()
    assert [json.loads(line) for line in lines] == [{"settings": {"filter": "x"}}, {"number": 1, "score": 1 / 3}]
