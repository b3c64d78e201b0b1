"""Processes that each train one side of a comparison, and are timed in turn."""

import multiprocessing
import multiprocessing.connection
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from benchmark_models import Side

import megavlm


class Worker:
    """A process that trains one side, and works when it is told to."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        """Start ``serve(connection, *arguments)``, which builds the side and then calls :func:`answer_all`."""
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=serve, args=(other_end, *arguments), daemon=True)
        self._process.start()
        other_end.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``function(side, *arguments)`` of the process.

        Raises:
            EOFError: the process has failed, and its own error is above.
        """
        self._connection.send((function, arguments))
        return self._connection.recv()

    def end(self) -> None:
        """Let the process end by itself."""
        self._connection.close()
        self._process.join()


def answer_all(connection: multiprocessing.connection.Connection, side: Side) -> None:
    """Answer one request after the other."""
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        connection.send(function(side, *arguments))


def time_steps(side: Side, num_steps: int) -> float:
    """Median seconds of a step."""
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        side.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def describe_machine(num_threads: int) -> str:
    """Say what was measured, on what."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"MegaVLM {megavlm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, Python"
        f" {platform.python_version()}; {num_threads} threads of {os.cpu_count()} cores, load {load:.1f};"
        f" {torch.backends.cpu.get_cpu_capability()}"
    )
