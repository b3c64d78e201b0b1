"""Scores of models: from what ``megavlm eval`` left in their folders, or from a command that measures them."""

import hashlib
import json
import math
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megavlm.checkpoint.manifest import MANIFEST_NAME
from megavlm.runtime.log import LOGGER

EVALUATION_NAME = "evaluation.json"
_SHOWN = 400


@dataclass(frozen=True)
class ScoreSettings:
    """Where scores come from."""

    command: str | None = None
    """Run for each model, ``{folder}`` being its run folder. Not given to a shell. Its score is the number in its last
    line of output; where that is none, what stands in ``file`` then. None: what stands in ``file`` already."""
    file: str = EVALUATION_NAME
    """Results of ``megavlm eval``, in the run folder; ``{checkpoint}`` is the checkpoint's name."""
    lower_is_better: bool = False
    environment: Mapping[str, str] | None = None
    """Of the command; None: this process' own."""


def score_model(folder: Path, checkpoint: Path, settings: ScoreSettings) -> float | None:
    """Return a model's score; None where there is no command and no file.

    Args:
        folder: its run folder.
        checkpoint: the checkpoint in it that is meant.
        settings: where scores come from.

    Raises:
        ValueError: the command fails or tells no number, or the file is damaged or of another checkpoint.
    """
    if settings.command is not None:
        number = _run(settings.command, folder, settings.environment)
        if number is not None:
            return number
    path = folder / settings.file.replace("{checkpoint}", checkpoint.name)
    if path.is_file():
        return _read(path, checkpoint)
    if settings.command is None:
        return None
    raise ValueError(
        f"--score-command={settings.command}: its last line is no number, and it left no {path}. Let it print the "
        "score, or give --score-file."
    )


def _run(command: str, folder: Path, environment: Mapping[str, str] | None) -> float | None:
    """Run the command. Returns the number in its last line, if it is one."""
    if "{folder}" not in command:
        raise ValueError(f"--score-command={command}: does not name {{folder}}, the run folder to be scored. Add it.")
    try:
        words = [word.replace("{folder}", str(folder)) for word in shlex.split(command)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    except (OSError, ValueError) as error:
        raise ValueError(f"--score-command={command}: cannot be run ({error}). Check it.") from None
    if done.returncode != 0:
        told = (done.stderr.strip() or done.stdout.strip())[-_SHOWN:]
        said = f"and said: {told}" if told else "and said nothing. Run it by hand to see why."
        raise ValueError(f"--score-command={command}: ended with {done.returncode} for {folder} {said}")
    lines = done.stdout.strip().splitlines()
    try:
        number = float(lines[-1]) if lines else None
    except ValueError:
        return None
    if number is None:
        return None
    if not math.isfinite(number):
        raise ValueError(f"--score-command={command}: says {number} for {folder}, which is no score.")
    LOGGER.info("%s: score %g", folder, number)
    return number


def _read(path: Path, checkpoint: Path) -> float:
    """Read ``evaluation.json``, if it is of the checkpoint."""
    try:
        tree = json.loads(path.read_bytes())
        value, evaluated = float(tree["score"]["value"]), tree["settings"]["checkpoint"]
        name, manifest = str(evaluated["name"]), str(evaluated["manifest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: is no result of megavlm eval ({type(error).__name__}: {error}). Evaluate the run again."
        ) from None
    with (checkpoint / MANIFEST_NAME).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if name != checkpoint.name or digest not in manifest:
        raise ValueError(
            f"{path}: is of another checkpoint ({name}) than {checkpoint}. Evaluate the run again, or name the "
            "checkpoint."
        )
    if not math.isfinite(value):
        raise ValueError(f"{path}: its score is {value}. Evaluate the run again.")
    return value
