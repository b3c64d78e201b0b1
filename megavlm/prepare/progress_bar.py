"""The bar that a person at a terminal sees."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar:
    """How many of how many are done. Has no thread, so that processes can be forked while it is shown."""

    def __init__(self, what: str, *, is_shown: bool = True) -> None:
        """Say what is counted, and whether this process shows it."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
            disable=not (is_shown and sys.stderr.isatty()),
        )
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> "ProgressBar":
        """Show it."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take it away."""
        self._progress.stop()

    def show(self, done: int, total: int) -> None:
        """Move it."""
        self._progress.update(self._task, completed=done, total=total, refresh=True)
