"""Writes files so that they are on the disk, not only in its cache, when the next step relies on them."""

import errno
import os
import shutil
from pathlib import Path

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a full disk, and of a quota that is used up."""


def write_file(path: Path, data: bytes) -> None:
    """Write a file, its folders made if need be, and wait until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that at every moment is either the old or the new one."""
    new = path.with_name(path.name + ".new")
    write_file(new, data)
    os.replace(new, path)
    sync(path.parent)


def whole_lines(path: Path) -> list[bytes]:
    """Read a file that was appended to line by line; a last one that its writer did not finish is cut off there, too.

    Returns:
        The lines with their ends; none if there is no such file.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        with path.open("r+b") as file:
            file.truncate(sum(map(len, lines)))
    return lines


def copy_file(source: Path, path: Path) -> None:
    """Copy a file's bytes, and wait until they are on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until the lists of names of a folder and of all folders in it are on the disk."""
    for parent, _, _ in os.walk(folder):
        sync(Path(parent))
