"""Saves the checkpoints of a run, beside training if the recipe says so."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavlm.build import Parts
from megavlm.checkpoint import AsyncSaver, RunFolder, save_checkpoint
from megavlm.config import dump_recipe
from megavlm.data import Progress
from megavlm.runtime.log import LOGGER
from megavlm.training.position import Position
from megavlm.training.spikes import SpikeWatch


class Saver:
    """Saves checkpoints. Every method is collective."""

    def __init__(self, parts: Parts, folder: RunFolder, data_order: Mapping[str, Any] | None) -> None:
        """Save the run of ``parts`` in ``folder``.

        Args:
            parts: of the run.
            folder: of the run.
            data_order: what the order of the samples depends on; None on ranks that read no data.
        """
        self._parts = parts
        self._folder = folder
        self._data_order = data_order
        self._asynchronous = AsyncSaver() if parts.recipe.checkpoint.async_save else None

    def save(self, position: Position, progress: Progress, spikes: SpikeWatch | None = None) -> None:
        """Save, or begin to save, the run as it is now."""
        recipe = self._parts.recipe
        extra: dict[str, Any] = {
            "consumed_samples": position.consumed_samples,
            "data": progress.to_json(),
            "data_order": self._data_order,
        }
        if spikes is not None:
            extra["loss_spike"] = spikes.to_json()
        with _tokenizer_files(self._parts) as files:
            save = self._asynchronous.save if self._asynchronous else save_checkpoint
            save(
                self._folder,
                position.iteration,
                self._parts.engine,
                extra=extra,
                files={"recipe.yaml": dump_recipe(recipe), **files},
                keep_last=recipe.checkpoint.keep_last,
            )

    def poll(self) -> None:
        """Complete a checkpoint that has been written meanwhile."""
        if self._asynchronous is not None and (path := self._asynchronous.poll()):
            LOGGER.info("saved %s", path)

    def finish(self) -> None:
        """Wait for a checkpoint on its way."""
        if self._asynchronous is not None:
            self._asynchronous.finish()


@contextlib.contextmanager
def _tokenizer_files(parts: Parts) -> Iterator[dict[str, Path]]:
    """The tokenizer's files, by their names in the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        parts.tokenizer.save(Path(folder))
        yield {f"tokenizer/{path.name}": path for path in Path(folder).iterdir()}
