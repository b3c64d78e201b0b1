"""Who says what, where, and how often."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavlm.runtime.log import LOGGER, quiet_third_parties, start_log, stop_log, warn_once


@pytest.fixture(autouse=True)
def _silence_after() -> Iterator[None]:
    yield
    stop_log()


def test_rank_0_writes_plain_lines_to_stdout_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run" / "log.txt"
    start_log(rank=0, file=file)
    LOGGER.info("step %d", 3)
    assert capsys.readouterr().out.endswith(" step 3\n")
    start_log(rank=0, file=file)  # a resumed run goes on in the same file
    LOGGER.info("step 4")
    assert [line.split(" ", 2)[2] for line in file.read_text().splitlines()] == ["step 3", "step 4"]


def test_other_ranks_are_heard_when_something_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    start_log(rank=3)
    LOGGER.info("step 3")
    warn_once("everybody knows")
    warn_once("only I know", any_rank=True)
    LOGGER.error("broken")
    lines = [line.split(" ", 2)[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["[rank 3] warning: only I know", "[rank 3] broken"]


def test_rank_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    start_log()
    LOGGER.info("not heard")
    assert capsys.readouterr().out == ""


def test_a_warning_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    start_log(rank=0)
    assert [warn_once("again"), warn_once("again"), warn_once("another")] == [True, False, True]
    assert capsys.readouterr().out.count("warning: again") == 1


def test_known_noise_is_silenced_and_nothing_else() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_third_parties()
        warnings.warn("Transformer Engine and Apex are not installed. Falling back to Torch optimizers.", stacklevel=1)
        warnings.warn("your disk is full", stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["your disk is full"]
