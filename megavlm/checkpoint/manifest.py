"""The list of a checkpoint's files with their sizes and sha256 sums. A checkpoint is complete when it has one.

megatron-core and torch notice neither a flipped bit nor half of what can be missing, so the list is compared with the
files before anything is read from them. Hashing is shared over the ranks and, on each, over threads.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from megavlm.checkpoint import durable
from megavlm.checkpoint.agreement import agreed, gather, rank, world_size
from megavlm.runtime.log import LOGGER

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

_NUM_THREADS = 4
_CHUNK_BYTES = 8 * 2**20
_LARGE_BYTES = 8 * 2**30
"""From here on hashing takes seconds, and says that it does."""
_SECONDS_BETWEEN_HINTS = 30.0
_REMEDY = "Copy it again, or choose another checkpoint."
_WRITER = re.compile(r"(?:^__|^rng/rank_)(\d+)[_.]")
"""Files that carry the rank that wrote them in their name."""


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file."""

    size: int
    """Bytes."""
    sha256: str


def write_manifest(folder: Path) -> None:
    """Hash every file of a folder and write the list, as the last of its files. Collective.

    Each rank hashes what it wrote itself, which is still in its node's memory.

    Raises:
        ValueError: a file cannot be read or the list not be written; on every rank.
    """
    names = list_files(folder)
    mine = [name for name in names if _writer(name) % world_size() == rank()]
    entries: dict[str, FileEntry] = {}
    with agreed(f"hashing {folder}"):
        entries = hash_files(folder, mine)
    together = {name: entry for part in gather(entries) for name, entry in part.items()}
    with agreed(f"writing {folder / MANIFEST_NAME}"):
        if rank() == 0:
            durable.replace_file(folder / MANIFEST_NAME, _dump(together))
            durable.sync_tree(folder)


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """Read the list of a checkpoint.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / MANIFEST_NAME
    try:
        tree = json.loads(path.read_bytes())
        entries = {
            str(name): FileEntry(int(entry["size"]), str(entry["sha256"])) for name, entry in tree["files"].items()
        }
        is_whole = tree["sha256"] == _checksum(entries) and tree["version"] == FORMAT_VERSION
    except FileNotFoundError:
        raise ValueError(
            f"{path}: is missing, so {folder.name} is not complete, or another program wrote it. Choose another "
            "checkpoint, or load without verification if you trust it."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is damaged ({type(error).__name__}: {error}). Choose another checkpoint.") from None
    if not is_whole:
        raise ValueError(
            f"{path}: is damaged (its list does not have the checksum that it states, or its version is not "
            f"{FORMAT_VERSION}). Choose another checkpoint."
        )
    return entries


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has a whole manifest and every file of it at full size. Nothing is hashed."""
    try:
        entries = read_manifest(folder)
    except ValueError:
        return False
    return not _find_wrong_sizes(folder, entries)


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest. Collective.

    Raises:
        ValueError: names the first file that is missing, truncated (with both sizes) or changed; on every rank.
    """
    problem = find_damage(folder)
    if problem is not None:
        raise ValueError(problem)


def find_damage(folder: Path) -> str | None:
    """What :func:`verify` would say, or None. Collective."""
    entries: dict[str, FileEntry] = {}
    problems: dict[str, str] = {}
    try:
        entries = read_manifest(folder)
        problems = _find_wrong_sizes(folder, entries)
    except ValueError as error:
        problems = {MANIFEST_NAME: str(error)}
    if not any(gather(bool(problems))):  # nothing is hashed of what is known to be damaged
        mine = _share({name: entry.size for name, entry in entries.items()}, world_size())[rank()]
        problems = _find_changes(folder, {name: entries[name] for name in mine})
    found = sorted((name, problem) for part in gather(problems) for name, problem in part.items())
    if not found:
        return None
    others = len({name for name, _ in found}) - 1
    return found[0][1] + (f" {others} more file(s) are damaged too." if others else "")


def list_files(folder: Path) -> list[str]:
    """Names of all files below a folder, ``/`` between folders, without the manifest."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST_NAME)


def hash_files(folder: Path, names: Sequence[str]) -> dict[str, FileEntry]:
    """Hash some files of a folder in threads.

    Raises:
        OSError: a file cannot be read.
    """
    total = sum((folder / name).stat().st_size for name in names)
    progress = _Progress(folder, total)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _hash_file(folder / name, progress), names), strict=True))


class _Progress:
    """Says now and then how far hashing is, if there is much of it. Only rank 0 is heard, of its own share."""

    def __init__(self, folder: Path, total: int) -> None:
        self._folder = folder
        self._total = total
        self._done = 0
        self._last = time.monotonic()
        if total >= _LARGE_BYTES:
            LOGGER.info("checking %s: %.1f GB to hash on this rank", folder, total / 1e9)

    def add(self, num_bytes: int) -> None:
        """Count bytes; threads may count a few twice or not at all, which a hint can bear."""
        self._done += num_bytes
        now = time.monotonic()
        if now - self._last > _SECONDS_BETWEEN_HINTS:
            self._last = now
            LOGGER.info("checking %s: %.1f of %.1f GB", self._folder, self._done / 1e9, self._total / 1e9)


def _hash_file(path: Path, progress: _Progress) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            progress.add(len(chunk))
    return FileEntry(size, digest.hexdigest())


def _find_wrong_sizes(folder: Path, entries: Mapping[str, FileEntry]) -> dict[str, str]:
    """Return a sentence for each file that is not there, or not whole. Nothing is read."""
    problems = {}
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            problems[name] = f"{path}: is missing. {_REMEDY}"
        elif (size := path.stat().st_size) != entry.size:
            problems[name] = f"{path}: has {size} bytes, and had {entry.size} when it was saved. {_REMEDY}"
    return problems


def _find_changes(folder: Path, entries: Mapping[str, FileEntry]) -> dict[str, str]:
    """Hash files; return a sentence for each that is not what it was."""
    try:
        found = hash_files(folder, list(entries))
    except OSError as error:
        return {str(error.filename): f"{error.filename}: cannot be read ({error.strerror}). {_REMEDY}"}
    return {
        name: f"{folder / name}: has changed since it was saved (sha256 {found[name].sha256[:12]}..., was "
        f"{entry.sha256[:12]}...). {_REMEDY}"
        for name, entry in entries.items()
        if found[name] != entry
    }


def _share(sizes: Mapping[str, int], num_ranks: int) -> list[list[str]]:
    """Deal files to ranks, the largest first and each to the rank with least to do."""
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return shares


def _writer(name: str) -> int:
    match = _WRITER.match(name)
    return int(match.group(1)) if match else 0


def _dump(entries: Mapping[str, FileEntry]) -> bytes:
    files = {name: asdict(entry) for name, entry in sorted(entries.items())}
    tree = {"version": FORMAT_VERSION, "sha256": _checksum(entries), "files": files}
    return (json.dumps(tree, indent=1) + "\n").encode()


def _checksum(entries: Mapping[str, FileEntry]) -> str:
    lines = "".join(f"{entry.sha256} {entry.size} {name}\n" for name, entry in sorted(entries.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
