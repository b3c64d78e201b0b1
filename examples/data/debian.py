"""Packages of Debian: downloaded by apt from the sources that this machine is set to, and unpacked, never installed."""

import shutil
import subprocess
from pathlib import Path


def unpack(package: str, folder: Path) -> Path:
    """Bring a package's files into ``folder/package``, unless they are there.

    Args:
        package: its name.
        folder: where to; is made.

    Returns:
        The folder with ``usr/``.

    Raises:
        ValueError: the tools are missing, or the package cannot be had.
    """
    target = folder / package
    if target.is_dir():
        return target
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ValueError(f"{package}: needs {tool}, which is not here. Use Debian, or a container of it.")
    folder.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "-q", "download", package], folder, f"{package}: apt-get cannot download it")
    [file] = sorted(folder.glob(f"{package}_*.deb"))[:1]
    new = folder / f"{package}.writing"
    shutil.rmtree(new, ignore_errors=True)
    _run(["dpkg-deb", "-x", str(file.resolve()), str(new.resolve())], folder, f"{file}: dpkg-deb cannot unpack it")
    new.rename(target)
    return target


def _run(command: list[str], folder: Path, problem: str) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise ValueError(f"{problem} ({last}). Check the network; `apt-get update` may be needed first.")
