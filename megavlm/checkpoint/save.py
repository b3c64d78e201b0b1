"""Saves a checkpoint, and waits until it is on the disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.checkpoint.folder import Iteration, RunFolder
from megavlm.checkpoint.writer import CheckpointWriter, File
from megavlm.engines import MegatronEngine


def save_checkpoint(
    folder: RunFolder | Path | str,
    iteration: Iteration,
    engine: MegatronEngine,
    extra: Mapping[str, Any] | None = None,
    files: Mapping[str, File] | None = None,
    *,
    with_optimizer: bool = True,
    keep_last: int | None = None,
) -> Path:
    """Save a run: model, optimizer, random number generators, and what the caller adds. Collective.

    Whatever ends the process, and whenever: the checkpoints that were complete before still are, and this one is
    complete or not there. The next run's :meth:`RunFolder.clean` removes what is left of it.

    Args:
        folder: the run folder; made if need be.
        iteration: steps done, or ``release`` for weights without a step.
        engine: model and optimizer.
        extra: JSON-able state that :func:`load_checkpoint` returns: schedule, consumed samples. Rank 0's is saved.
        files: name inside the checkpoint -> text, bytes, or path of a file or folder to copy. Rank 0's are saved.
        with_optimizer: False: weights only.
        keep_last: afterwards, how many of the newest checkpoints to keep; None: all.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: the disk is full or may not be written, or an argument is wrong; the same on every rank.
    """
    run_folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    writer = CheckpointWriter(run_folder, iteration, keep_last)
    sharded = writer.prepare(engine, extra or {}, files or {}, with_optimizer=with_optimizer)
    writer.write(sharded)
    return writer.finish()
