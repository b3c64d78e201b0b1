"""Gives and takes signs of life through the store that the ranks met at, in a thread of its own."""

import json
import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store  # the store that the ranks met at has no other name

from megavlm.runtime.activity import Activity, Phase
from megavlm.runtime.sign import Lookout, Sign

_FAILED_KEY = "failed"
_STORE_TIMEOUT = timedelta(seconds=30)


class AwakeClock:
    """Seconds for which this process was running: a process that was stopped must not blame the others for it."""

    def __init__(self, longest_tick: float) -> None:
        """Begin at 0; a stop of the process counts as ``longest_tick`` seconds."""
        self._longest_tick = longest_tick
        self._last = time.monotonic()
        self.now = 0.0
        """The time at the last tick."""

    def tick(self) -> float:
        """Move on, by no more than the longest tick."""
        now = time.monotonic()
        self.now += min(now - self._last, self._longest_tick)
        self._last = now
        return self.now


@dataclass(frozen=True)
class Failure:
    """What a rank told the others before it ended."""

    rank: int
    node: str
    text: str
    is_final: bool
    """Whether it is the reason why the whole run ends, in one text for all; or only an error of that rank."""

    def to_text(self) -> str:
        """For the store."""
        return json.dumps(vars(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> "Failure":
        """Back from the store."""
        return cls(**json.loads(text))


class Exchange(threading.Thread):
    """The thread that speaks to the store. A store that does not answer holds up this thread and no other."""

    def __init__(
        self,
        store: torch.distributed.Store | None,
        rank: int,
        world_size: int,
        activity: Activity,
        clock: AwakeClock,
        beat_seconds: float,
    ) -> None:
        """Take a connection of its own to the store.

        Args:
            store: where the ranks meet; None: the store of the default process group.
            rank: of this process.
            world_size: number of ranks.
            activity: what this rank is doing.
            clock: ticked by somebody else.
            beat_seconds: between two signs.
        """
        super().__init__(name="signs of life", daemon=True)
        # a connection of its own: the main thread may wait on the other one
        own = (store if store is not None else _get_default_store()).clone()  # type: ignore[attr-defined]  # its stub lacks it
        own.set_timeout(_STORE_TIMEOUT)
        self._store = torch.distributed.PrefixStore("watchdog", own)
        self._rank = rank
        self._world_size = world_size
        self._activity = activity
        self._beat_seconds = beat_seconds
        self._node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
        self._beat = 0
        self._to_tell: Failure | None = None
        self._is_over = threading.Event()
        self._clock = clock
        self._answered_at = clock.now
        self._heard: dict[int, tuple[Sign, float, float]] = {}  # sign, when its beat and when its place changed
        self.is_reading = threading.Event()
        """Set while the signs of the others are wanted."""
        self.has_told = threading.Event()
        """Set when a failure of this rank has reached the store."""
        self.failure: Failure | None = None
        """What a rank has told: the first error, or why the run ends."""
        self.error: str | None = None
        """Why the store can no longer be reached."""

    def own_sign(self) -> Sign:
        """What this rank is doing."""
        moment = self._activity.now
        return Sign.of(moment, beat=self._beat, node=self._node, idle_seconds=time.monotonic() - moment.since)

    def fail(self, text: str, *, is_final: bool = False) -> None:
        """Tell the others, with the next beat; the first failure of a run is kept, or the first that is final."""
        self._to_tell = Failure(self._rank, self._node, text, is_final)

    def stop(self) -> None:
        """End the thread after what it is doing."""
        self._is_over.set()

    def lookout(self) -> Lookout:
        """What is known of all ranks."""
        now = self._clock.now
        heard = dict(self._heard)
        signs = {rank: sign for rank, (sign, _, _) in heard.items()} | {self._rank: self.own_sign()}
        silent = {rank: now - beat_at for rank, (_, beat_at, _) in heard.items()}
        return Lookout(dict(sorted(signs.items())), silent, self._world_size)

    def phases(self) -> set[Phase]:
        """What the other ranks are doing."""
        return {sign.phase for sign, _, _ in dict(self._heard).values()}

    def idle_seconds(self) -> float:
        """For how long no other rank was seen to get anywhere."""
        moved = [moved_at for _, _, moved_at in dict(self._heard).values()]
        return self._clock.now - max(moved) if moved else 0.0

    def silent_seconds(self) -> float:
        """For how long the store has not answered."""
        return self._clock.now - self._answered_at

    def run(self) -> None:
        """Give a sign every beat, and read those of the others when they are wanted."""
        while not self._is_over.is_set():
            try:
                self._give_and_take()
            except RuntimeError as error:  # torch's errors of the network are such
                if not self._is_over.is_set():
                    self.error = first_line(error)
                return
            self._answered_at = self._clock.now
            self._is_over.wait(self._beat_seconds)

    def _give_and_take(self) -> None:
        self._beat += 1
        self._store.set(f"rank{self._rank}", self.own_sign().to_text())
        if self._to_tell is not None:
            self._tell(self._to_tell)
            self._to_tell = None
        if self._store.check([_FAILED_KEY]):
            self.failure = Failure.from_text(self._store.get(_FAILED_KEY))
        if self.is_reading.is_set():
            self._read()
        else:
            self._heard.clear()  # what was heard long ago says nothing of silence

    def _tell(self, failure: Failure) -> None:
        known = Failure.from_text(self._store.compare_set(_FAILED_KEY, "", failure.to_text()))
        if failure.is_final and not known.is_final:
            self._store.set(_FAILED_KEY, failure.to_text())
        self.has_told.set()

    def _read(self) -> None:
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        if not self._store.check([f"rank{rank}" for rank in others]):
            others = [rank for rank in others if self._store.check([f"rank{rank}"])]
        if not others:
            return
        now = self._clock.now
        for rank, text in zip(others, self._store.multi_get([f"rank{rank}" for rank in others]), strict=True):
            sign = Sign.from_text(text)
            before, beat_at, moved_at = self._heard.get(rank, (None, now, now))
            if before is not None and sign.beat != before.beat:
                beat_at = now
            if before is not None and sign.place != before.place:
                moved_at = now
            self._heard[rank] = (sign, beat_at, moved_at)


def first_line(error: BaseException) -> str:
    """An error's text without what follows it, such as a stack of C++."""
    return next(iter(str(error).splitlines()), "")
