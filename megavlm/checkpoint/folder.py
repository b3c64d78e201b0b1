"""The run folder: which checkpoints it holds, which is the newest, and how one comes and goes, never half-valid.

``iter_0000100/`` holds step 100, ``release/`` weights without a step. ``latest_checkpointed_iteration.txt`` names the
last one saved, for people and other programs; what counts here is the manifest in each folder. A checkpoint is written
into ``iter_0000100.writing-<token>/`` and deleted from ``iter_0000100.deleting-<token>/``: a run that dies in between
leaves such a folder, and the next one removes it.
"""

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megavlm.checkpoint import durable
from megavlm.checkpoint.manifest import is_complete
from megavlm.runtime.log import LOGGER

TRACKER_NAME = "latest_checkpointed_iteration.txt"
RELEASE: Literal["release"] = "release"

Iteration = int | Literal["release"]

_NAME = re.compile(r"iter_(\d{7,})|(release)")
_LEFTOVER = re.compile(rf"({_NAME.pattern})\.(writing|deleting)-[0-9a-f]{{8}}")


def iteration_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name; 0 if there is none in it."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match and match.group(1) else 0


class RunFolder:
    """A run folder on disk. Only rank 0 of the run that owns it changes it."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def checkpoint(self, iteration: Iteration) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.path / (RELEASE if iteration == RELEASE else f"iter_{iteration:07d}")

    def checkpoints(self) -> list[Iteration]:
        """Steps of all folders named like a checkpoint, damaged ones too; ``release`` first, then ascending."""
        matches = [_NAME.fullmatch(path.name) for path in self.path.iterdir()] if self.path.is_dir() else []
        steps = sorted(int(match.group(1)) for match in matches if match and match.group(1))
        release: list[Iteration] = [RELEASE] if any(match and match.group(2) for match in matches) else []
        return [*release, *steps]

    def complete(self) -> list[Iteration]:
        """Those of :meth:`checkpoints` that have a manifest and every file of it at full size."""
        return [iteration for iteration in self.checkpoints() if is_complete(self.checkpoint(iteration))]

    def newest(self) -> Iteration | None:
        """The one of :meth:`checkpoints` with the highest step; ``release`` if there is no other; None if nothing is.

        It may be damaged, and then must not be passed over in silence: a checkpoint gets its name when it is complete.
        """
        present = self.checkpoints()
        return present[-1] if present else None

    def read_tracker(self) -> Iteration | None:
        """What ``latest_checkpointed_iteration.txt`` says; None if there is none.

        Raises:
            ValueError: it holds neither a number nor ``release``.
        """
        path = self.path / TRACKER_NAME
        try:
            text = path.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return None
        if text == RELEASE:
            return RELEASE
        if not text.isdecimal():
            raise ValueError(
                f"{path}: holds {text[:40]!r}, not a step or {RELEASE!r}. Delete it; the folders say it too."
            )
        return int(text)

    def start_writing(self, iteration: Iteration) -> Path:
        """Make the folder that a checkpoint is written into."""
        folder = self._beside(iteration, "writing")
        folder.mkdir(parents=True)
        return folder

    def publish(self, written: Path, iteration: Iteration) -> Path:
        """Give a written folder its name, and only then name it in the tracker. A folder of that name is replaced."""
        target = self.checkpoint(iteration)
        replaced = self._beside(iteration, "deleting")
        if target.exists():
            os.rename(target, replaced)
        os.rename(written, target)
        durable.sync(self.path)
        durable.replace_file(self.path / TRACKER_NAME, f"{iteration}\n".encode())
        if replaced.exists():
            shutil.rmtree(replaced)
        return target

    def prune(self, keep_last: int, *, keep: Iteration | None = None) -> list[int]:
        """Delete the oldest complete checkpoints. Damaged ones, ``release`` and other programs' are left alone.

        Args:
            keep_last: how many of the newest to keep.
            keep: a step that stays whatever its age: the one just written.

        Returns:
            The steps that were deleted.
        """
        assert keep_last >= 1, "the last good checkpoint is never deleted"
        steps = [step for step in self.complete() if isinstance(step, int)]
        old = [step for step in steps[:-keep_last] if step != keep]
        for step in old:
            self.delete(step)
        return old

    def delete(self, iteration: Iteration) -> None:
        """Delete a checkpoint: it is gone under its name before the first of its files is."""
        doomed = self._beside(iteration, "deleting")
        os.rename(self.checkpoint(iteration), doomed)
        durable.sync(self.path)
        shutil.rmtree(doomed)

    def set_aside(self, damaged: Sequence[Iteration], newest: Iteration) -> list[Path]:
        """Take the names from damaged checkpoints, so that ``newest`` is the newest again. Nothing is deleted.

        Returns:
            Where they are now (``iter_0000100.damaged-<token>``).
        """
        places = [self._beside(iteration, "damaged") for iteration in damaged]
        for iteration, place in zip(damaged, places, strict=True):
            os.rename(self.checkpoint(iteration), place)
        durable.sync(self.path)
        durable.replace_file(self.path / TRACKER_NAME, f"{newest}\n".encode())
        return places

    def clean(self) -> list[str]:
        """Remove what a run that died left behind. For the start of the run that owns the folder, on rank 0.

        A written folder that was complete but had not got its name yet gets it, unless there is one of that name.

        Returns:
            Names of the folders that were removed or renamed.
        """
        if not self.path.is_dir():
            return []
        found = ((path, _LEFTOVER.fullmatch(path.name)) for path in self.path.iterdir())
        # "writing" before "deleting": a new checkpoint takes its place before the one it replaces is gone
        leftovers = sorted(
            ((path, match) for path, match in found if match), key=lambda pair: pair[0].name, reverse=True
        )
        for path, match in leftovers:
            target = self.path / match.group(1)
            if match.group(4) == "writing" and not target.exists() and is_complete(path):
                LOGGER.info("%s was complete: renamed to %s", path, target.name)
                os.rename(path, target)
            else:
                LOGGER.info("%s: removed (left by a run that was interrupted)", path)
                shutil.rmtree(path)
        return [path.name for path, _ in leftovers]

    def _beside(self, iteration: Iteration, state: Literal["writing", "deleting", "damaged"]) -> Path:
        """A fresh name, so that what a dying process still writes cannot end up in the next one's folder."""
        return self.path / f"{self.checkpoint(iteration).name}.{state}-{secrets.token_hex(4)}"
