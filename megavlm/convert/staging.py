"""A folder that appears under its name when it is complete, or not at all; and a bar while it grows."""

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megavlm.checkpoint import durable


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a fresh folder beside ``target``, which gets that name at the end of the block, unless the block fails.

    Raises:
        ValueError: the target exists, or may not be written.
    """
    if target.exists() or target.is_symlink():
        raise ValueError(f"target={target}: exists already. Choose another, or remove it.")
    folder = target.with_name(f"{target.name}.writing-{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True)
        yield folder
        durable.sync_tree(folder)
        os.rename(folder, target)
        durable.sync(target.parent)
    except OSError as error:
        raise ValueError(
            f"target={target}: cannot be written ({error.strerror or error}). Make room, or choose another."
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def progress_bar() -> Progress:
    """A bar for terminals: log files get none."""
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
