"""Checkpoints: save, resume under any layout, keep the last few, and never trust a file.

A run folder holds::

    latest_checkpointed_iteration.txt    the last step saved, or the word release
    iter_0000100/
        __0_0.distcp ... .metadata common.pt metadata.json    megatron-core's torch_dist format: model and optimizer
        extra.json                       what the caller gave: schedule, consumed samples
        layout.json                      step, layout, shapes without padding
        rng/rank_00000.json ...          random number generators of each rank
        recipe.yaml, tokenizer/ ...      the caller's files
        manifest.json                    size and sha256 of every other file; its presence means complete
    release/                             the same without optimizer: weights that start other runs

- :func:`save_checkpoint` (or :class:`AsyncSaver`) writes under another name, then renames: a run that is killed at any
  moment leaves its older checkpoints usable. :meth:`RunFolder.clean` removes what such a run leaves behind; the run
  that owns the folder calls it on rank 0 when it starts.
- :func:`load_checkpoint` verifies the manifest, refuses pickles that name anything but plain data, compares keys and
  shapes, and only then loads. Its errors are one ValueError, the same on all ranks.
- :func:`start_from` fills a fresh model from several checkpoints, each weight from one of them.
"""

from megavlm.checkpoint.asynchronous import AsyncSaver
from megavlm.checkpoint.folder import RunFolder
from megavlm.checkpoint.load import Loaded, find_checkpoint, find_to_resume, load_checkpoint
from megavlm.checkpoint.manifest import verify
from megavlm.checkpoint.save import save_checkpoint
from megavlm.checkpoint.start import start_from

__all__ = [
    "AsyncSaver",
    "Loaded",
    "RunFolder",
    "find_checkpoint",
    "find_to_resume",
    "load_checkpoint",
    "save_checkpoint",
    "start_from",
    "verify",
]
