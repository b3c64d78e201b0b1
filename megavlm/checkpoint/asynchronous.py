"""Saves checkpoints while training goes on, through megatron-core's queue of asynchronous calls.

Tensors are copied to the CPU and handed to a forked process on each rank. When all ranks' processes are done, the next
:meth:`AsyncSaver.poll` writes the manifest and gives the checkpoint its name, so it is complete then and not before.
"""

import multiprocessing
import time
from collections.abc import Mapping
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megavlm.checkpoint.agreement import from_rank_0
from megavlm.checkpoint.folder import Iteration, RunFolder
from megavlm.checkpoint.writer import CheckpointWriter, File
from megavlm.engines import MegatronEngine
from megavlm.runtime.activity import ACTIVITY
from megavlm.runtime.signals import deaf_children, hear_parent_only

_SECONDS_BETWEEN_POLLS = 0.05


def check_async_save() -> None:
    """Check whether this process can save asynchronously.

    Raises:
        ValueError: it cannot, and why.
    """
    remedy = "Set checkpoint.async_save=false."
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError(f"checkpoint.async_save=True: this system cannot fork processes. {remedy}")
    if not filesystem_async.HAVE_PSUTIL:  # its writers die of it unheard, and it waits for them for ever
        raise ValueError(
            f"checkpoint.async_save=True: megatron-core needs psutil for it. pip install psutil, or {remedy}"
        )
    if multiprocessing.current_process().daemon:
        raise ValueError(f"checkpoint.async_save=True: a daemonic process may not start others. {remedy}")


def _start_results_queue() -> None:
    """Start the process that holds the queue of results, as megatron-core would, but deaf to a launcher's signals.

    megatron-core's ends with SIGTERM to the process group, and the checkpoint on its way is lost with it.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with deaf_children():
            manager.start(initializer=hear_parent_only)
        filesystem_async._results_queue = manager.Queue()


class AsyncSaver:
    """At most one checkpoint on its way to the disk. Every method is collective.

    Use: :meth:`save` instead of :func:`megavlm.checkpoint.save_checkpoint`, :meth:`poll` after each step,
    :meth:`finish` before the run ends. What :meth:`save` returns is there after a later poll.
    """

    def __init__(self, *, timeout_minutes: float = 30.0) -> None:
        """Check that it can work here.

        Args:
            timeout_minutes: how long :meth:`finish` waits for the writing processes.

        Raises:
            ValueError: see :func:`check_async_save`.
        """
        check_async_save()
        self._queue = AsyncCallsQueue()
        self._writer: CheckpointWriter | None = None
        self._timeout_minutes = timeout_minutes

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._writer is not None

    def save(
        self,
        folder: RunFolder | Path | str,
        iteration: Iteration,
        engine: MegatronEngine,
        extra: Mapping[str, Any] | None = None,
        files: Mapping[str, File] | None = None,
        *,
        with_optimizer: bool = True,
        keep_last: int | None = None,
    ) -> None:
        """Start saving; arguments and errors are those of :func:`megavlm.checkpoint.save_checkpoint`.

        If the checkpoint before is still on its way, it is finished first.
        """
        self.finish()
        _start_results_queue()
        run_folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
        writer = CheckpointWriter(run_folder, iteration, keep_last)
        sharded = writer.prepare(engine, extra or {}, files or {}, with_optimizer=with_optimizer)
        request = writer.write_later(sharded)
        with writer.failing(f"starting to write {run_folder.checkpoint(iteration)}"):
            self._queue.schedule_async_request(request)
        self._writer = writer

    def poll(self) -> Path | None:
        """Complete the checkpoint if all ranks have written it; do nothing if not.

        Returns:
            Its folder if it has just been completed.

        Raises:
            ValueError: it could not be written; on every rank. Checkpoints saved before are as they were.
        """
        if self._writer is None:
            return None
        writer, done = self._writer, False
        try:
            with writer.failing(f"writing checkpoint {writer.iteration}"):
                done = bool(self._queue.maybe_finalize_async_calls(blocking=False))
        except ValueError:
            self._writer = None
            raise
        if not done:
            return None
        self._writer = None
        return writer.finish()

    def finish(self) -> Path | None:
        """Wait until the checkpoint on its way is complete. Returns its folder, or None if there was none.

        Raises:
            ValueError: it could not be written, or not within ``timeout_minutes``.
        """
        deadline = time.monotonic() + 60.0 * self._timeout_minutes
        while self._writer is not None:
            path = self.poll()
            if path is not None:
                return path
            if from_rank_0("waiting for writers", lambda: time.monotonic() > deadline):
                self._give_up(self._writer)
            ACTIVITY.advance()  # all ranks answer, so none hangs; the deadline is the limit here
            time.sleep(_SECONDS_BETWEEN_POLLS)
        return None

    def _give_up(self, writer: CheckpointWriter) -> None:
        """A writer that was killed leaves its parent waiting for ever."""
        self._writer = None
        for call in self._queue.async_calls:
            call.async_caller.close(abort=True)
        self._queue = AsyncCallsQueue()
        # one queue of results serves all saves of a process: a late writer's would pass for those of the next save
        filesystem_async._results_queue = None
        with writer.failing("waiting for writers"):
            raise ValueError(
                f"checkpoint.async_save=True: checkpoint {writer.iteration} was not written within "
                f"{self._timeout_minutes} minutes; a writing process was killed, or the disk is too slow. Set "
                "checkpoint.async_save=false."
            )
