"""A preflight ends by itself and names who did not answer, whatever the other ranks do."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from preflight_recipe import recipe_in

from megavlm.preflight import run as run_module
from megavlm.preflight.meeting import Meeting
from megavlm.preflight.run import run_preflight


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch):
    """Makes this process one rank of several on nodes n1 and n2."""

    def be(rank: int, world_size: int = 2) -> None:
        values = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "MASTER_PORT": free_port()}
        for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "MEGAVLM_NODES": "n1 n2"}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("SLURMD_NODENAME", f"n{rank + 1}")

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    return be


@pytest.fixture(autouse=True)
def _nothing_ends_this_process_later() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    timers = [thread for thread in set(threading.enumerate()) - before if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)


def test_a_single_process_checks_itself(launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_preflight(recipe_in(tmp_path), timeout_seconds=60.0)
    assert "all 1 rank(s) on 1 node(s) are ready" in capsys.readouterr().out
    assert os.listdir(tmp_path / "run") == []  # nothing of the preflight is left behind


def test_a_rank_that_never_starts_is_named(launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launcher(0)
    started = time.monotonic()
    assert not run_preflight(recipe_in(tmp_path), timeout_seconds=1.0)
    assert time.monotonic() - started < 20.0
    out = capsys.readouterr().out
    assert "preflight: FAILED: n2 (rank 1): start: gave no sign of life within 1 s." in out
    assert "are ready" not in out


def test_rank_0_that_never_starts_is_named(launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launcher(1)
    assert not run_preflight(recipe_in(tmp_path), timeout_seconds=1.0)
    err = capsys.readouterr().err
    assert "n2 (rank 1): no answer from rank 0 at 127.0.0.1:" in err
    assert "rank 0 should be on n1" in err


def test_a_file_system_that_hangs_is_named(launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_in(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    os.mkfifo(tmp_path / "train.jsonl")  # who opens it waits for a writer that never comes
    assert not run_preflight(recipe, timeout_seconds=2.0)
    assert "(rank 0): data: hangs; was given 1 s." in capsys.readouterr().out
    os.close(os.open(tmp_path / "train.jsonl", os.O_RDWR | os.O_NONBLOCK))  # let the thread go


def test_a_rank_that_hangs_after_its_answer_is_named(
    launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 comes to the meeting, begins its checks and is never heard of again."""
    launcher(0)
    hung = threading.Thread(target=lambda: Meeting(1, 2, 20.0).tell("doing", "its own checks"))
    hung.start()
    assert not run_preflight(recipe_in(tmp_path), timeout_seconds=3.0)
    hung.join()
    assert "n2 (rank 1): its own checks: hangs; was given 3 s." in capsys.readouterr().out


def test_a_node_with_another_run_folder_is_named(
    launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_SHARED_SECONDS", 0.5)
    launcher(0)
    recipe = recipe_in(tmp_path)
    recipe.checkpoint.save.mkdir()

    def rank_1() -> None:
        meeting = Meeting(1, 2, 20.0)
        meeting.ask("token", 0, time.monotonic() + 20.0)
        meeting.tell("facts", run_module.Facts(1, 0, "n2", device="cpu").to_json())  # wrote its file elsewhere
        assert meeting.ask("go", 0, time.monotonic() + 20.0) == "no"
        meeting.tell("left", "")

    other = threading.Thread(target=rank_1)
    other.start()
    assert not run_preflight(recipe, timeout_seconds=20.0)
    other.join()
    assert f"n2 (rank 1): run folder: checkpoint.save={tmp_path}/run: is another folder" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_no_time_is_an_error(launcher, tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match=r"--timeout-seconds=\S+: must be above 0"):
        run_preflight(recipe_in(tmp_path), timeout_seconds=seconds)


def test_a_port_that_is_taken_is_an_error(launcher, tmp_path: Path) -> None:
    launcher(0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        taken.listen()
        with pytest.raises(ValueError, match=r"MASTER_PORT=\d+: cannot be opened on 127.0.0.1"):
            run_preflight(recipe_in(tmp_path), timeout_seconds=2.0)
