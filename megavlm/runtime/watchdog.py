"""Ends a run of several ranks that cannot go on, with a message that says which rank holds it up and where.

Every rank gives signs of life to the store that the ranks met at, and looks at those of the others when it gets nowhere
itself. Both happen in threads of their own, so they go on while the main thread waits in a collective (gloo and nccl
release python's lock). docs/FAULTS.md says which faults are found how soon.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

import torch.distributed

from megavlm.runtime.activity import ACTIVITY, Activity, Moment, Phase
from megavlm.runtime.exchange import AwakeClock, Exchange, first_line
from megavlm.runtime.log import LOGGER
from megavlm.runtime.sign import Lookout

EXIT_CODE = 75
"""Of a process that its watchdog ended (EX_TEMPFAIL): nothing is wrong here, the same command resumes the run."""

BEAT_SECONDS = 1.0
"""Between two signs of life."""
SUSPICION_SECONDS = 5.0
"""A rank that got nowhere for so long looks at the others."""
IMPATIENT_LOST_SECONDS = 10.0
"""Silence after which a rank is lost where SIGTERM has come: a launcher that ends a run gives little time."""
FAILED_LOST_SECONDS = 4.0
"""The same where a collective has failed, which says that some rank is gone."""
FAILED_SEARCH_SECONDS = 12.0
"""How long that rank is looked for."""
SLOW_PHASES = frozenset({Phase.STARTING, Phase.LOADING, Phase.SAVING, Phase.ENDING})
SLOW_FACTOR = 4.0
"""These, and the first step, may take so many times ``hang_seconds``."""


class Watchdog:
    """Watches over a block of training. Use as a context manager, on every rank; alone, it does nothing.

    An error that leaves the block is told to the other ranks. An error of a collective is answered by a search for the
    rank that is gone; the process then ends with :data:`EXIT_CODE`, as it does when the watchdog finds the run hung.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        hang_seconds: float,
        lost_seconds: float,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
        store: torch.distributed.Store | None = None,
        activity: Activity = ACTIVITY,
        end: Callable[[int], object] = os._exit,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        """Take what it needs; it starts with the block.

        Args:
            rank: of this process.
            world_size: number of ranks.
            hang_seconds: a run in which no rank gets anywhere for so long is hung.
            lost_seconds: a rank that gives no sign for so long is lost.
            is_asked_to_stop: whether a signal has asked this process to stop.
            store: where the ranks meet; None: the store of the default process group.
            activity: what this rank is doing.
            end: ends the process.
            beat_seconds: between two signs; the other times shrink with it.
        """
        self._rank = rank
        self._world_size = world_size
        self._hang_seconds = hang_seconds
        self._lost_seconds = lost_seconds
        self._is_asked_to_stop = is_asked_to_stop
        self._activity = activity
        self._end = end
        self._beat_seconds = beat_seconds
        self._pace = beat_seconds / BEAT_SECONDS
        self._main_thread = threading.get_ident()
        self._first_step: int | None = None
        self._is_over = threading.Event()
        self._has_told = threading.Event()
        self._collective_error: str | None = None
        self._error: BaseException | None = None
        self._clock = AwakeClock(2.0 * beat_seconds)
        self._exchange = (
            Exchange(store, rank, world_size, activity, self._clock, beat_seconds) if world_size > 1 else None
        )
        self._judge = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._exchange is not None:
            self._exchange.start()
            self._judge.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching; tell the others of an error, or search for the rank whose end was the cause of it."""
        if self._exchange is None:
            return
        if error is not None and is_collective_error(error):
            self._error = error
            self._collective_error = f"{type(error).__name__}: {first_line(error)}"
            self._judge.join()  # ends the process
        self._is_over.set()
        if isinstance(error, Exception) and self._collective_error is None:
            position = self._exchange.own_sign().position()
            self._exchange.fail(f"failed at {position}: {type(error).__name__}: {first_line(error)}")
            # the store may go with this process: the others need a moment to read why
            self._exchange.has_told.wait(5.0 * self._beat_seconds)
            time.sleep(2.5 * self._beat_seconds)
        self._exchange.stop()

    # ---- the judge's thread ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Look every beat whether the run can go on; end the process if not."""
        assert self._exchange is not None
        moment, moved_at = self._activity.now, 0.0
        search_began: float | None = None
        while not self._is_over.wait(self._beat_seconds):
            now = self._clock.tick()
            if self._activity.now is not moment:
                moment, moved_at = self._activity.now, now
            if self._first_step is None and moment.step:
                self._first_step = moment.step
            if self._collective_error is not None and search_began is None:
                search_began = now
                LOGGER.error(
                    "%s: a collective failed (%s): looking for the rank that is gone",
                    self._exchange.own_sign().position(),
                    self._collective_error,
                )
            stuck = now - moved_at
            self._exchange.is_reading.set() if self._is_suspicious(stuck) else self._exchange.is_reading.clear()
            verdict = self._judge_run(moment, stuck, now - search_began if search_began is not None else None)
            if verdict is not None and not self._is_over.is_set():
                self._speak_and_end(verdict)
                return

    def _is_suspicious(self, stuck: float) -> bool:
        return stuck >= SUSPICION_SECONDS * self._pace or self._collective_error is not None

    def _judge_run(self, moment: Moment, stuck: float, searching: float | None) -> str | None:
        """Say why the run cannot go on; None: it can, as far as is known.

        Args:
            moment: where this rank is.
            stuck: seconds since it got there.
            searching: seconds since one of its collectives failed.
        """
        assert self._exchange is not None
        failure = self._exchange.failure
        if failure is not None and failure.rank != self._rank and failure.is_final:
            return f"Rank {failure.rank} has found: {failure.text}"
        lookout = self._exchange.lookout()
        if self._exchange.error is not None and failure is None:  # even while it gets on: nobody is left to end it
            return self._say_store_is_gone(self._exchange.error, lookout)
        if not self._is_suspicious(stuck):
            return None
        if failure is not None and failure.rank != self._rank:
            text = f"Rank {failure.rank} ({failure.node}) {failure.text}"
            return f"{text} {lookout.say_others([failure.rank])}"
        limit = self._lost_limit(searching)
        if lost := lookout.lost(limit):
            return f"{lookout.say_lost(lost)} {lookout.say_others(lost)}"
        if self._exchange.silent_seconds() >= limit:
            return self._say_store_is_gone(f"no answer for {self._exchange.silent_seconds():.0f} s", lookout)
        if searching is not None and searching >= FAILED_SEARCH_SECONDS * self._pace:
            return (
                f"A collective failed ({self._collective_error}), but every rank gives signs of life: look at the "
                f"network, and at the first error in the log. {lookout.say_others([])}"
            )
        idle = min(stuck, self._exchange.idle_seconds())
        if idle >= self._hang_limit(moment):
            return f"{lookout.say_hung(idle)} {lookout.say_others(lookout.behind())}"
        return None

    @staticmethod
    def _say_store_is_gone(problem: str, lookout: Lookout) -> str:
        return (
            f"The store of the run, which rank 0 or its launcher keeps, is gone ({problem}): that process was killed"
            f" or stopped, or its node is gone. {lookout.say_others([])}"
        )

    def _lost_limit(self, searching: float | None) -> float:
        if searching is not None:
            return min(self._lost_seconds, FAILED_LOST_SECONDS * self._pace)
        if self._is_asked_to_stop():
            return min(self._lost_seconds, IMPATIENT_LOST_SECONDS * self._pace)
        return self._lost_seconds

    def _hang_limit(self, moment: Moment) -> float:
        """The longest that any rank may take for what it does now."""
        assert self._exchange is not None
        phases = {moment.phase, *self._exchange.phases()}
        is_slow = not phases.isdisjoint(SLOW_PHASES) or moment.step in (0, self._first_step)
        return self._hang_seconds * (SLOW_FACTOR if is_slow else 1.0)

    def _speak_and_end(self, verdict: str) -> None:
        """Say it, let the other ranks say it too, and end the process, whatever its main thread waits for."""
        assert self._exchange is not None
        self._exchange.fail(verdict, is_final=True)
        sign = self._exchange.own_sign()
        text = (
            f"the run cannot go on. {verdict} This rank was at {sign.position()} for {sign.idle_seconds:.0f} s. "
            "The same command resumes the run from its newest checkpoint."
        )
        # in a thread: the main thread may hold the lock of a log that cannot be written
        speaker = threading.Thread(target=self._speak, args=(text,), daemon=True)
        speaker.start()
        # rank 0 may keep the store, from which the others read what it found
        time.sleep((5.0 if self._rank == 0 else 3.0) * self._beat_seconds)
        speaker.join(2.0 * self._beat_seconds)
        if not self._has_told.is_set():
            os.write(2, f"[rank {self._rank}] {text}\n".encode())
        self._exchange.stop()
        self._end(EXIT_CODE)

    def _speak(self, text: str) -> None:
        LOGGER.error("%s", text)
        self._has_told.set()
        if self._error is not None:
            where, lines = "where the collective failed", traceback.format_exception(self._error)
        else:
            frame = sys._current_frames().get(self._main_thread)
            where, lines = "where its main thread is", traceback.format_stack(frame) if frame is not None else []
        sys.stderr.write(f"[rank {self._rank}] {where}:\n{''.join(lines)}")
        sys.stderr.flush()


def is_collective_error(error: BaseException) -> bool:
    """Whether an error says that a collective of torch.distributed broke off, usually because another rank is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    cause = error.__cause__
    if cause is not None and cause is not error and is_collective_error(cause):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
