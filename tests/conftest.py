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
from core import forgotten, is_core

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


def pytest_configure(config: pytest.Config) -> None:
    """Show failures where they are gathered: in the controller of parallel workers, or in the only process."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_FailuresAtOnce(config))


class _FailuresAtOnce:
    """Prints a failure when it happens: a run that is cut off, or hangs later, has then told its failures."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.ensure_newline()
            terminal.line(f"{report.outcome.upper()} {report.nodeid} ({report.when}, {report.duration:.1f} s)")
            terminal.line(report.longreprtext)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases that do not run by default, and say how many; a test asked for by its case's name runs."""
    if config.args == config.getini("testpaths") and (lost := forgotten(item.nodeid for item in items)):
        raise pytest.UsageError(f"tests/core.py names what is not there: {', '.join(lost)}")
    if config.getoption("--everything") or any("[" in argument for argument in config.args):
        return
    left_out = [item for item in items if not is_core(item.nodeid)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_core(item.nodeid)]
