"""The preflight of one rank: what it does when, and how it ends whatever the other ranks do.

First every rank looks at itself and tells rank 0, which waits no longer than agreed and so can name who is missing or
hangs. Only if all is well do the ranks try collectives. Everything that may hang runs in a thread of its own.
"""

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from megavlm.preflight.collective import Measured, measure
from megavlm.preflight.fact import Facts, find_facts, node_name, probe_file
from megavlm.preflight.meeting import Meeting
from megavlm.preflight.table import print_table
from megavlm.preflight.verdict import Failure, expected_node, judge_answers, judge_measured
from megavlm.recipe import Recipe
from megavlm.runtime.process import read_launcher

_SHARED_SECONDS = 10.0
"""How long rank 0 waits for the files of others to appear: network file systems keep what they know of a folder."""
_SLACK_SECONDS = 5.0


def run_preflight(recipe: Recipe, *, timeout_seconds: float) -> bool:
    """Run the preflight of this rank. Rank 0 prints the table.

    Args:
        recipe: of the run to come.
        timeout_seconds: for each of the two parts. Every rank ends within twice this and a minute.

    Returns:
        Whether the run can start; the same on all ranks that are there.

    Raises:
        ValueError: the timeout or the launcher's variables are wrong.
    """
    if not timeout_seconds > 0:
        raise ValueError(f"--timeout-seconds={timeout_seconds:g}: must be above 0.")
    rank, world_size, local_rank = read_launcher()
    me = Facts(rank, local_rank, node_name())
    with _end_process_after(2 * timeout_seconds + _SHARED_SECONDS + 4 * _SLACK_SECONDS, rank):
        try:
            meeting = Meeting(rank, world_size, timeout_seconds)
        except TimeoutError as error:
            _complain(f"{me.node} (rank {rank}): {error}; rank 0 should be on {expected_node(0, world_size)}")
            return False
        return _Preflight(recipe, me, meeting, timeout_seconds).run()


class _Preflight:
    """What the parts of a preflight share."""

    def __init__(self, recipe: Recipe, me: Facts, meeting: Meeting, timeout_seconds: float) -> None:
        self._recipe = recipe
        self._me = me
        self._meeting = meeting
        self._timeout = timeout_seconds
        self._deadline = time.monotonic() + timeout_seconds

    def run(self) -> bool:
        """Both parts, on this rank."""
        meeting = self._meeting
        meeting.tell("doing", "start")
        if self._me.rank == 0:
            meeting.tell("token", uuid.uuid4().hex[:8])
        token = meeting.ask("token", 0, self._deadline)
        if token is None:
            return self._without_rank_0()
        self._look_at_itself(token)
        meeting.tell("facts", self._me.to_json())
        is_ready = self._judge(token) if self._me.rank == 0 else self._hear()
        if self._me.rank != 0:
            meeting.tell("left", "")
        else:  # the store ends with this process: let the others hear the verdict
            meeting.ask_all("left", time.monotonic() + _SLACK_SECONDS, self._present)
        return is_ready

    def _look_at_itself(self, token: str) -> None:
        """Run the checks that need no other rank; say so if one of them hangs."""
        doing = ["start"]

        def begin(check: str) -> None:
            doing[0] = check

        limit = self._timeout - min(_SLACK_SECONDS, self._timeout / 2)
        self._meeting.tell("doing", "its own checks")
        if not _run_within(limit, lambda: find_facts(self._recipe, self._me, token, begin)):
            self._me.problems.append((doing[0], f"hangs; was given {limit:g} s."))

    def _measure(self) -> Measured:
        """Try the collectives together with the others."""
        found: list[Measured] = []
        ended = _run_within(self._timeout, lambda: found.append(measure(self._timeout)))
        return found[0] if ended and found else Measured(error=f"did not come back within {self._timeout:g} s.")

    def _hear(self) -> bool:
        """Ranks other than 0: do what rank 0 says."""
        go = self._meeting.ask("go", 0, self._deadline + self._timeout + _SHARED_SECONDS)
        if go is None:
            return self._without_rank_0()
        if go == "no":
            return False
        self._meeting.tell("measured", self._measure().to_json())
        verdict = self._meeting.ask("verdict", 0, time.monotonic() + self._timeout + _SLACK_SECONDS)
        return self._without_rank_0() if verdict is None else verdict == "yes"

    def _judge(self, token: str) -> bool:
        """Rank 0: wait for all, decide, say it."""
        meeting, world_size = self._meeting, self._meeting.world_size
        answers = meeting.ask_all("facts", self._deadline)
        facts = {rank: Facts.from_json(text) for rank, text in answers.items()}
        self._present = [rank for rank in facts if rank]
        missing = set(range(world_size)) - set(facts)
        doing = meeting.ask_all("doing", time.monotonic(), missing)
        failures = judge_answers(facts, world_size, doing, self._timeout)
        failures += _unseen_probes(self._recipe.checkpoint.save, token, facts)
        measured: dict[int, Measured] = {}
        meeting.tell("go", "no" if failures else "yes")
        if not failures:
            meeting.tell("measured", self._measure().to_json())
            answers = meeting.ask_all("measured", time.monotonic() + _SLACK_SECONDS)
            measured = {rank: Measured.from_json(text) for rank, text in answers.items()}
            failures = judge_measured(measured, facts, self._timeout)
        print_table(facts, measured, failures, world_size)
        meeting.tell("verdict", "no" if failures else "yes")
        return not failures

    def _without_rank_0(self) -> bool:
        me = self._me
        _complain(
            f"{me.node} (rank {me.rank}): rank 0 on {expected_node(0, self._meeting.world_size)} stopped answering"
        )
        return False


def _unseen_probes(folder: Path, token: str, facts: dict[int, Facts]) -> list[Failure]:
    """Ranks whose file in the run folder rank 0 does not see: they write somewhere else."""
    wrote = [rank for rank, found in facts.items() if not any(check == "run folder" for check, _ in found.problems)]
    deadline = time.monotonic() + _SHARED_SECONDS
    unseen = [rank for rank in wrote if not probe_file(folder, token, rank).exists()]
    while unseen and time.monotonic() < deadline:
        time.sleep(0.2)
        os.listdir(folder)  # makes a network file system look again
        unseen = [rank for rank in unseen if not probe_file(folder, token, rank).exists()]
    for rank in wrote:
        probe_file(folder, token, rank).unlink(missing_ok=True)
    text = f"checkpoint.save={folder}: is another folder than rank 0's. Choose one that all nodes share."
    nodes = {facts[rank].node for rank in unseen}
    return [
        Failure(node, tuple(rank for rank in unseen if facts[rank].node == node), "run folder", text)
        for node in sorted(nodes)
    ]


def _run_within(seconds: float, function: Callable[[], object]) -> bool:
    """Run a function in a thread and wait so long for it; whether it ended."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


@contextlib.contextmanager
def _end_process_after(seconds: float, rank: int) -> Iterator[None]:
    """End this process when the block takes longer than it ever should."""

    def end() -> None:
        _complain(f"{node_name()} (rank {rank}): preflight did not end within {seconds:g} s")
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _complain(text: str) -> None:
    print(f"preflight: FAILED: {text}", file=sys.stderr, flush=True)
