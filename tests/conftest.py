"""What every test gets: one thread, and an end of the ranks that the session started. Time limits: pytest-timeout."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "parallel"))  # `from harness import run_ranks`, in every test folder

import harness

import megavlm.runtime  # noqa: F401  settles the device before a test imports megatron.core

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _end_of_ranks() -> Iterator[None]:
    """End the ranks that :func:`harness.run_ranks` kept."""
    yield
    harness.close_ranks()
