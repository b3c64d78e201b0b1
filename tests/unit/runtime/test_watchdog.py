"""The watchdog of one rank, among ranks that are played by threads: who is named, when, and when nobody is."""

import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed

from megavlm.runtime import exchange
from megavlm.runtime.activity import Activity, Phase
from megavlm.runtime.exchange import AwakeClock, Failure
from megavlm.runtime.log import LOGGER
from megavlm.runtime.sign import Lookout, Sign, name_ranks
from megavlm.runtime.watchdog import EXIT_CODE, Watchdog, is_collective_error

BEAT = 0.1  # of a second; all other times shrink with it
SOON = 20.0  # a machine with much else to do; alone, every case ends within 3 s
GLOO_ERROR = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"


class PlayedRank:
    """A rank that gives signs of life until it dies."""

    def __init__(self, store: torch.distributed.Store, rank: int, step: int, phase: Phase, part: int = 0) -> None:
        self._store = torch.distributed.PrefixStore("watchdog", store.clone())
        self._rank = rank
        self.place = (step, phase, part)
        self._is_dead = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._store.wait([f"rank{rank}"])

    def _run(self) -> None:
        beat = 0
        while not self._is_dead.is_set():
            beat += 1
            step, phase, part = self.place
            self._store.set(f"rank{self._rank}", Sign(beat, f"n{self._rank}", step, phase, part, 7.0).to_text())
            time.sleep(BEAT)

    def die(self) -> None:
        """Give no more signs; the last one stays in the store."""
        self._is_dead.set()
        self._thread.join()


@pytest.fixture
def store() -> torch.distributed.Store:
    return torch.distributed.HashStore()


@pytest.fixture
def play(store: torch.distributed.Store) -> Iterator[Callable[..., PlayedRank]]:
    """Plays a rank to the end of the test."""
    played: list[PlayedRank] = []

    def start(rank: int, step: int = 5, phase: Phase = Phase.COMPUTING, part: int = 0) -> PlayedRank:
        played.append(PlayedRank(store, rank, step, phase, part))
        return played[-1]

    yield start
    for rank in played:
        rank.die()


class Guarded:
    """Rank 0 under a watchdog, at step 5."""

    def __init__(self, store: torch.distributed.Store | None, world_size: int = 3, **settings: Any) -> None:
        self.activity = Activity()
        self.activity.begin(Phase.READING, step=4)  # the first step has more time
        self.ended: list[int] = []
        self.has_ended = threading.Event()
        self.dog = Watchdog(
            0,
            world_size,
            **{"hang_seconds": 1000.0, "lost_seconds": 1000.0, **settings},
            store=store,
            activity=self.activity,
            end=self._end,
            beat_seconds=BEAT,
        )

    def _end(self, code: int) -> None:
        self.ended.append(code)
        self.has_ended.set()

    def __enter__(self) -> "Guarded":
        self.dog.__enter__()
        time.sleep(3 * BEAT)
        self.activity.begin(Phase.COMPUTING, step=5)
        self.activity.advance()
        return self

    def __exit__(self, *what: Any) -> None:
        self.dog.__exit__(*what)


def told(store: torch.distributed.Store) -> dict[str, Any]:
    """What the store says failed."""
    return json.loads(torch.distributed.PrefixStore("watchdog", store).get("failed"))


def test_a_dead_rank_is_named_with_what_it_last_did(
    store: torch.distributed.Store, play: Callable[..., PlayedRank], caplog: pytest.LogCaptureFixture
) -> None:
    dead = play(1, part=2)
    play(2, phase=Phase.UPDATING)
    with Guarded(store, lost_seconds=1.0) as guarded:
        dead.die()
        assert guarded.has_ended.wait(SOON)
    assert guarded.ended == [EXIT_CODE]
    text = caplog.text
    assert "Rank 1 (n1) has given no sign of life for" in text
    assert "Last seen at step 5, forward and backward, micro-batch 2." in text
    assert "Rank 2: step 5, updating the weights, for 7 s or more." in text
    assert "This rank was at step 5, forward and backward, micro-batch 1 for" in text
    assert told(store)["is_final"]


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (
            [(5, Phase.READING), (5, Phase.COMPUTING, 1)],
            ["Rank 1 (n1) hangs at step 5, reading data.", "Ranks 0, 2: step 5, forward and backward, micro-batch 1"],
        ),
        ([(5, Phase.COMPUTING, 1), (4, Phase.REPORTING)], ["Rank 2 (n2) hangs at step 4, reporting the step."]),
        ([(5, Phase.COMPUTING, 1), (5, Phase.COMPUTING, 1)], ["all are at the same place", "Ranks 0-2: step 5"]),
    ],
)
def test_a_run_that_gets_nowhere_is_ended_and_who_is_behind_is_named(
    store: torch.distributed.Store,
    play: Callable[..., PlayedRank],
    caplog: pytest.LogCaptureFixture,
    places: list[tuple[Any, ...]],
    words: list[str],
) -> None:
    for rank, place in enumerate(places, start=1):
        play(rank, *place)
    with Guarded(store, hang_seconds=1.5) as guarded:
        assert guarded.has_ended.wait(SOON)
    for word in ["No rank has got anywhere for", *words]:
        assert word in caplog.text


def test_what_is_slow_is_not_ended(store: torch.distributed.Store, play: Callable[..., PlayedRank]) -> None:
    """Another rank that goes on, a phase that may be slow, and a rank that goes on itself."""
    other = play(1)
    settings = {"world_size": 2, "hang_seconds": 1.0, "lost_seconds": 2.0}
    with Guarded(store, **settings) as guarded:
        for part in range(15):
            other.place = (5, Phase.COMPUTING, part)
            assert not guarded.has_ended.wait(0.2)
        other.place = (5, Phase.SAVING, 0)
        assert not guarded.has_ended.wait(2.0)
        other.place = (5, Phase.COMPUTING, 0)
        for _ in range(10):
            guarded.activity.advance()
            assert not guarded.has_ended.wait(0.2)
    assert guarded.ended == []


def test_an_error_of_another_rank_is_repeated(
    store: torch.distributed.Store, play: Callable[..., PlayedRank], caplog: pytest.LogCaptureFixture
) -> None:
    play(1)
    play(2)
    with Guarded(store) as guarded:
        failure = Failure(1, "n1", "failed at step 5, reading data: ValueError: the disk is gone", is_final=False)
        torch.distributed.PrefixStore("watchdog", store).set("failed", failure.to_text())
        assert guarded.has_ended.wait(SOON)
    assert "Rank 1 (n1) failed at step 5, reading data: ValueError: the disk is gone" in caplog.text


def test_what_another_watchdog_found_ends_this_rank_too(
    store: torch.distributed.Store, play: Callable[..., PlayedRank], caplog: pytest.LogCaptureFixture
) -> None:
    play(1)
    with Guarded(store) as guarded:
        failure = Failure(2, "n2", "Rank 1 (n1) hangs at step 5.", is_final=True)
        torch.distributed.PrefixStore("watchdog", store).set("failed", failure.to_text())
        deadline = time.monotonic() + SOON
        while not guarded.ended and time.monotonic() < deadline:
            guarded.activity.advance()  # it would not see it by itself
            time.sleep(BEAT / 2)
    assert guarded.ended == [EXIT_CODE]
    assert "Rank 2 has found: Rank 1 (n1) hangs at step 5." in caplog.text


def test_a_failed_collective_is_answered_with_the_rank_that_is_gone(
    store: torch.distributed.Store, play: Callable[..., PlayedRank], caplog: pytest.LogCaptureFixture
) -> None:
    play(1, part=3).die()
    play(2)
    with pytest.raises(RuntimeError, match="Connection closed"), Guarded(store) as guarded:
        raise RuntimeError(GLOO_ERROR)
    assert guarded.ended == [EXIT_CODE]
    assert "a collective failed (RuntimeError: [../third_party/gloo" in caplog.text
    assert "Rank 1 (n1) has given no sign of life" in caplog.text
    assert "Last seen at step 5, forward and backward, micro-batch 3." in caplog.text


def test_a_failed_collective_among_living_ranks_says_so(
    store: torch.distributed.Store, play: Callable[..., PlayedRank], caplog: pytest.LogCaptureFixture
) -> None:
    play(1)
    play(2)
    with pytest.raises(RuntimeError, match="Connection closed"), Guarded(store) as guarded:
        raise RuntimeError(GLOO_ERROR)
    assert guarded.ended == [EXIT_CODE]
    assert "but every rank gives signs of life" in caplog.text


def test_an_error_of_its_own_is_told_to_the_others(store: torch.distributed.Store) -> None:
    with pytest.raises(ValueError, match="rows"), Guarded(store) as guarded:
        raise ValueError("rows=0: there are none")
    assert guarded.ended == []
    assert (
        told(store)["text"]
        == "failed at step 5, forward and backward, micro-batch 1: ValueError: rows=0: there are none"
    )
    assert not told(store)["is_final"]


def test_asked_to_stop_it_waits_less_for_a_lost_rank(
    store: torch.distributed.Store, play: Callable[..., PlayedRank], caplog: pytest.LogCaptureFixture
) -> None:
    dead = play(1)
    with Guarded(store, world_size=2, is_asked_to_stop=lambda: True) as guarded:
        dead.die()
        assert guarded.has_ended.wait(SOON)
    assert "Rank 1 (n1) has given no sign of life" in caplog.text


def test_without_its_store_it_names_rank_0(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    client = server.clone()
    with Guarded(client, world_size=2) as guarded:
        del server
        assert guarded.has_ended.wait(SOON)
    assert "The store of the run, which rank 0 or its launcher keeps, is gone" in caplog.text


def test_a_log_that_cannot_be_written_does_not_keep_it(
    store: torch.distributed.Store, play: Callable[..., PlayedRank], capfd: pytest.CaptureFixture[str]
) -> None:
    dead = play(1)
    handler = logging.StreamHandler(io.StringIO())
    LOGGER.addHandler(handler)
    handler.acquire()  # as a main thread does that hangs in a write
    try:
        with Guarded(store, world_size=2, lost_seconds=1.0) as guarded:
            dead.die()
            assert guarded.has_ended.wait(SOON)
    finally:
        handler.release()
        LOGGER.removeHandler(handler)
    assert "[rank 0] the run cannot go on. Rank 1 (n1) has given no sign of life" in capfd.readouterr().err


def test_alone_it_does_nothing() -> None:
    before = set(threading.enumerate())
    with Guarded(None, world_size=1) as guarded:
        assert set(threading.enumerate()) <= before
    assert guarded.ended == []


def test_time_in_which_a_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(exchange.time, "monotonic", lambda: now)
    clock = AwakeClock(longest_tick=2.0)
    now += 1.0
    assert clock.tick() == 1.0
    now += 3600.0
    assert clock.tick() == 3.0


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2], "ranks 0-2"), ([7, 0, 1, 5, 6], "ranks 0-1, 5-7"), ([1, 3], "ranks 1, 3")],
)
def test_ranks_are_named_in_spans(ranks: list[int], text: str) -> None:
    assert name_ranks(ranks) == text


def test_ranks_that_were_never_heard_are_named() -> None:
    sign = Sign(1, "n0", 3, Phase.SAVING, 0, 2.0)
    assert Sign.from_text(sign.to_text()) == sign
    assert "Never heard of: ranks 1-2." in Lookout({0: sign}, {}, 3).say_others([])


def test_errors_of_collectives_are_known() -> None:
    chained = ValueError("writing failed")
    chained.__cause__ = torch.distributed.DistNetworkError("gone")
    assert is_collective_error(RuntimeError(GLOO_ERROR))
    assert is_collective_error(torch.distributed.DistBackendError("NCCL error"))
    assert is_collective_error(chained)
    assert not is_collective_error(RuntimeError("DataLoader worker exited unexpectedly"))
    assert not is_collective_error(ValueError("gloo"))
