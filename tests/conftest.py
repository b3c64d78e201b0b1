"""What every test gets: one thread, and an end of the ranks that the session started. Time limits: pytest-timeout."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "parallel"))  # `from harness import run_ranks`, in every test folder

import harness
from core import is_core

import megavlm.runtime  # noqa: F401  settles the device before a test imports megatron.core

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _end_of_ranks() -> Iterator[None]:
    """End the ranks that :func:`harness.run_ranks` kept."""
    yield
    harness.close_ranks()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--everything``: the cases that :mod:`core` leaves out, too."""
    parser.addoption("--everything", action="store_true", help="run all cases of the large tables (see tests/core.py)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases that do not run by default, and say how many; a test asked for by its case's name runs."""
    if config.getoption("--everything") or any("[" in argument for argument in config.args):
        return
    left_out = [item for item in items if not is_core(item.nodeid)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_core(item.nodeid)]
