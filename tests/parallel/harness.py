"""Runs a function on several gloo ranks: ``run_ranks(function, world_size, *args)``.

Starting a rank costs seconds (python, torch, megatron-core), so ranks are forked from a server that has imported, and
only that, and they are kept: the processes of the first call serve every later call of the session, whatever its world
size. Each call gets a default process group of its own, and megatron-core's groups are destroyed after it. Ranks that
fail together are kept; a rank that hangs or dies takes all with it, and the next call starts new ones.

The function must be importable by name (defined at the top of a test module), and so must what is pickled with it.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from megavlm.runtime import process

DEFAULT_TIMEOUT_SECONDS = 120.0
_GRACE_SECONDS = 3.0  # after the first failure, for the other ranks to say theirs
_OUTPUT_LINES = 40
# megatron-core's gradient hooks hold their model in a cycle that runs through C++, and with it its process groups
# and their threads. Ranks that have gathered so many are replaced.
_MOST_THREADS = 400


FORKS = multiprocessing.get_context("forkserver")
"""Starts processes that have imported already. Forked from this process they could hang: tests leave threads in it."""
FORKS.set_forkserver_preload(
    ["megavlm", "megavlm.build", "megavlm.checkpoint", "megavlm.training.loop", "numpy.testing"]
)


class RankError(RuntimeError):
    """A rank failed. The text holds the traceback and the last output of the one that failed first."""


@dataclass(frozen=True)
class _Answer:
    """What came of a call on one rank."""

    succeeded: bool
    result: bytes = b""
    text: str = ""
    time: float = 0.0
    num_threads: int = 0


class _Rank:
    """One process that waits for calls."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.output = folder / f"rank{rank}.txt"
        self.connection, far_end = FORKS.Pipe()
        # not a daemon: those may have no children, and saving a checkpoint starts some
        self.process = FORKS.Process(target=_serve, args=(rank, far_end, self.output), daemon=False)
        self.process.start()
        far_end.close()

    def kill(self) -> None:
        """End the process and all that it started, by its own group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(timeout=10)
        self.connection.close()


_ranks: list[_Rank] = []
_folder: Path | None = None


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = DEFAULT_TIMEOUT_SECONDS
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks that share a gloo process group.

    Args:
        function: called on every rank; it finds its rank in torch.distributed.
        world_size: number of ranks.
        args: pickled; every rank gets the same.
        timeout: seconds for the call, start of the ranks not counted. Collectives give up a little before.

    Returns:
        What the ranks returned, by rank.

    Raises:
        RankError: a rank raised, died, or did not answer in time.
    """
    folder = _start_ranks(world_size)
    ranks = _ranks[:world_size]
    meeting_point = tempfile.mktemp(dir=folder, prefix="store")
    call = pickle.dumps((function, args))
    for rank in ranks:
        rank.connection.send((list(sys.path), call, world_size, meeting_point, timeout))
    answers, silent = _collect(ranks, timeout)
    failures = [(answer.time, number) for number, answer in answers.items() if not answer.succeeded]
    if not failures and not silent:
        if max(answer.num_threads for answer in answers.values()) > _MOST_THREADS:
            close_ranks()
        return [pickle.loads(answers[number].result) for number in range(world_size)]
    # One failure makes the other ranks fail or hang, so what came first is the cause: a death, else an exception.
    died = [number for number, text in silent.items() if text.startswith("died")]
    number = died[0] if died else min(failures)[1] if failures else min(silent)
    text = silent[number] if number in silent else answers[number].text
    output = _tail(ranks[number].output)
    if silent:
        close_ranks()  # the silent ones are still in the call
    raise RankError(f"rank {number} of {world_size} failed in {function.__name__}:\n{text}\nits output:\n{output}")


def close_ranks() -> None:
    """End all ranks. The next call starts new ones."""
    global _folder
    for rank in _ranks:
        rank.kill()
    _ranks.clear()
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)
        _folder = None


atexit.register(close_ranks)


def _start_ranks(world_size: int) -> Path:
    """Have at least ``world_size`` living ranks. Returns the folder of their files."""
    global _folder
    if any(not rank.process.is_alive() for rank in _ranks):
        close_ranks()
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="ranks"))
    started = [_Rank(number, _folder) for number in range(len(_ranks), world_size)]
    _ranks.extend(started)
    for rank in started:
        if not rank.connection.poll(300):
            close_ranks()
            raise RankError("a rank did not start within 300 seconds")
        rank.connection.recv()
    return _folder


def _collect(ranks: Sequence[_Rank], timeout: float) -> tuple[dict[int, _Answer], dict[int, str]]:
    """Wait for the answers. Returns them by rank, and for each rank without one what became of it."""
    answers: dict[int, _Answer] = {}
    dead: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while len(answers) + len(dead) < len(ranks):
        waiting = {
            rank.connection: number for number, rank in enumerate(ranks) if number not in answers and number not in dead
        }
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            return answers, dict.fromkeys(waiting.values(), f"no answer within {timeout} seconds") | dead
        for connection in ready:
            number = waiting[connection]
            try:
                answers[number] = connection.recv()
            except EOFError:
                ranks[number].process.join(timeout=5)
                dead[number] = f"died with exit code {ranks[number].process.exitcode}"
            if number in dead or not answers[number].succeeded:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return answers, dead


def _tail(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    return "\n".join(lines[-_OUTPUT_LINES:])


# ---- in the ranks ----------------------------------------------------------------------------------------------------


def _serve(rank: int, connection: multiprocessing.connection.Connection, output: Path) -> None:
    """Answer calls until the other end closes the connection or is gone: the server, too, ends with its process."""
    parent = os.getppid()
    os.setsid()  # the parent kills the group
    multiprocessing.set_start_method(None, force=True)  # a rank starts its own children as any process does
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            connection.send(_answer(rank, *connection.recv()))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpid(), signal.SIGKILL)


def _answer(rank: int, path: list[str], call: bytes, world_size: int, meeting_point: str, timeout: float) -> _Answer:
    """Run one call in process groups of its own."""
    sys.path[:] = path
    environment = dict(os.environ)
    try:
        function, args = pickle.loads(call)
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(meeting_point, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=max(1.0, 0.8 * timeout)),
        )
        result = pickle.dumps(function(*args))
        process.stop()
        return _Answer(succeeded=True, result=result, num_threads=len(os.listdir("/proc/self/task")))
    except BaseException:  # noqa: BLE001  whatever it is, the parent has to hear of it
        answer = _Answer(succeeded=False, text=traceback.format_exc(), time=time.monotonic())
        process.stop(clean=False)
        return answer
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.stdout.flush()
