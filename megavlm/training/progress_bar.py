"""The bar that a person at a terminal sees."""

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar:
    """How far a run is, how long it took, and its last loss."""

    def __init__(self, num_steps: int, done: int) -> None:
        """Show it: ``done`` of ``num_steps``."""
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        self._task = self._progress.add_task("training", total=num_steps, loss="")
        self._progress.update(self._task, completed=done)
        self._progress.start()

    def show(self, done: int, loss: float) -> None:
        """Move it."""
        self._progress.update(self._task, completed=done, loss=f"loss {loss:.3f}")

    def close(self) -> None:
        """Leave it as it is."""
        self._progress.stop()
