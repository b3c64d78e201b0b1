"""Prepares a source: shards in parallel, one record for each, so that an interrupted run goes on where it was."""

import hashlib
import itertools
import json
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megavlm.checkpoint import durable
from megavlm.prepare.energon import write_meta
from megavlm.prepare.formats import FORMATS, find_format
from megavlm.prepare.item import Format, FormatOptions, Item
from megavlm.prepare.sample import ImageLimits
from megavlm.prepare.shard import ShardRecord, shard_name, write_shard

RECORDS = ".prepare"
BAD_ROWS = "bad_rows.jsonl"
SUMMARY = "prepare.json"

_SETTINGS = "settings.json"
_SHARDS_AHEAD = 2  # of each process


@dataclass(frozen=True)
class PrepareSettings:
    """How a source is prepared."""

    format: str = "auto"
    """A key of ``FORMATS``, or ``auto``: found by the source's files."""
    samples_per_shard: int = 1000
    """Rows of the source that a shard is made of."""
    num_workers: int = 2
    """Processes; 0: in this one. The shards do not depend on it."""
    options: FormatOptions = field(default_factory=FormatOptions)
    limits: ImageLimits = field(default_factory=ImageLimits)


@dataclass(frozen=True)
class Prepared:
    """What came of a source."""

    folder: Path
    format: str
    num_items: int
    """Rows, pages or files of the source."""
    num_samples: int
    num_images: int
    num_shards: int
    num_bad_rows: int
    num_bad_images: int
    """Images that documents went on without."""
    reasons: dict[str, int]
    """How many of both were left out for what."""
    num_shards_found: int
    """Shards that an earlier call had made."""


def prepare(
    source: Path,
    folder: Path,
    settings: PrepareSettings,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Write the rows of a source as tar shards that the ``shards`` data set and megatron-energon read.

    The source is only read. Called again with the same settings, it makes the shards that are missing.

    Args:
        source: file or folder.
        folder: where to; made if need be.
        settings: how.
        report: is told how many of how many items are done, as it goes on.

    Raises:
        ValueError: the source cannot be read, no row of it can be used, or the folder holds something else.
    """
    _check(source, folder, settings)
    name = find_format(source) if settings.format == "auto" else settings.format
    format_ = FORMATS[name](source, settings.options)
    items = format_.items()
    shards = [
        items[first : first + settings.samples_per_shard] for first in range(0, len(items), settings.samples_per_shard)
    ]
    try:
        _open_folder(folder, _fingerprint(source, name, settings, items))
        records = {record.number: record for record in _finished(folder, len(shards))}
        num_found = len(records)
        done = sum(len(shards[number]) for number in records)
        report(done, len(items))
        missing = [number for number in range(len(shards)) if number not in records]
        for record in _write_all(folder, missing, shards, format_, settings):
            durable.replace_file(_record_path(folder, record.number), record.to_json())
            records[record.number] = record
            done += len(shards[record.number])
            report(done, len(items))
        return _finish(folder, name, len(items), [records[number] for number in range(len(shards))], num_found)
    except OSError as error:
        raise ValueError(f"out={folder}: cannot be written ({error}). Make room, or choose another.") from None


def _check(source: Path, folder: Path, settings: PrepareSettings) -> None:
    if settings.format != "auto" and settings.format not in FORMATS:
        raise ValueError(f"--format={settings.format}: is not known. Choose auto, {', '.join(FORMATS)}.")
    if not source.exists():
        raise ValueError(f"source={source}: is no file and no folder. Check the path.")
    for name, value, least in (
        ("--samples-per-shard", settings.samples_per_shard, 1),
        ("--workers", settings.num_workers, 0),
        ("--max-row-bytes", settings.options.max_row_bytes, 1),
        ("--max-document-characters", settings.options.max_document_characters, 2),
        ("--max-image-pixels", settings.limits.max_image_pixels, 1),
        ("--max-image-bytes", settings.limits.max_image_bytes, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}.")
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out={folder}: lies in source={source}, which is never changed. Choose another folder.")
    root = settings.options.image_root
    if root is not None and not root.is_dir():
        raise ValueError(f"--image-root={root}: is no folder. Check the path.")


def _fingerprint(source: Path, name: str, settings: PrepareSettings, items: Sequence[Item]) -> dict[str, Any]:
    """Everything that the shards depend on, but for the images."""
    digest = hashlib.sha256()
    for path in dict.fromkeys(item.path for item in items):
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return {
        "source": str(source.resolve()),
        "files": digest.hexdigest(),
        "format": name,
        "samples_per_shard": settings.samples_per_shard,
        "options": {**asdict(settings.options), "image_root": str(settings.options.image_root)},
        "limits": asdict(settings.limits),
    }


def _open_folder(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Make the folder, or see that it is one that these settings were used for."""
    path = folder / RECORDS / _SETTINGS
    if path.exists():
        try:
            before = json.loads(path.read_bytes())
        except ValueError:
            before = {}
        for key, value in fingerprint.items():
            if before.get(key) != value:
                raise ValueError(
                    f"out={folder}: holds shards of other settings or of another state of the source ({key} was "
                    f"{before.get(key)!r} and is {value!r} now). Choose another folder, or delete it."
                )
        for left in folder.glob("*.writing"):
            left.unlink()
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"out={folder}: is not empty, and holds no shards of this command. Choose another folder.")
    durable.replace_file(path, json.dumps(fingerprint).encode())


def _record_path(folder: Path, number: int) -> Path:
    return folder / RECORDS / f"{number:06d}.json"


def _finished(folder: Path, num_shards: int) -> Iterator[ShardRecord]:
    """The records of shards that are there as they were written."""
    for number in range(num_shards):
        try:
            record = ShardRecord.from_json(_record_path(folder, number).read_bytes())
        except (OSError, ValueError, TypeError, KeyError):
            continue
        path = folder / shard_name(number)
        size = path.stat().st_size if path.exists() else 0
        if size == record.num_bytes and (not size or path.with_name(f"{path.name}.idx").exists()):
            yield record


def _write_all(
    folder: Path, numbers: Sequence[int], shards: Sequence[list[Item]], format_: Format, settings: PrepareSettings
) -> Iterator[ShardRecord]:
    """Write shards, in this process or in others; their records as they are finished."""
    if settings.num_workers == 0:
        for number in numbers:
            yield write_shard(folder, number, shards[number], format_, settings.limits)
        return
    waiting = iter(numbers)
    running: set[Future[ShardRecord]] = set()
    context = multiprocessing.get_context("fork")  # a fresh interpreter would import everything anew
    num_workers = min(settings.num_workers, max(1, len(numbers)))
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker) as pool:
        try:
            while True:
                for number in itertools.islice(waiting, _SHARDS_AHEAD * num_workers - len(running)):
                    running.add(pool.submit(write_shard, folder, number, shards[number], format_, settings.limits))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BrokenProcessPool:
            raise ValueError(
                f"--workers={num_workers}: one of them was ended from outside. Look for the system's out-of-memory "
                "killer; the same command goes on, with fewer workers if need be."
            ) from None
        finally:
            for future in running:
                future.cancel()


def _start_worker() -> None:
    """Leave Ctrl-C to the process that waits for the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _finish(folder: Path, name: str, num_items: int, records: Sequence[ShardRecord], num_found: int) -> Prepared:
    """Write what is about the whole."""
    left_out = [row for record in records for row in record.bad_rows]
    rows = [row for row in left_out if not row.is_image]
    lines = [json.dumps(asdict(row), ensure_ascii=True) + "\n" for row in left_out]
    durable.replace_file(folder / BAD_ROWS, "".join(lines).encode())
    num_samples = sum(len(record.samples) for record in records)
    if not num_samples:
        listed = "".join(f"\n  {row.where}: {row.message}" for row in rows[:10])
        raise ValueError(f"source: none of its {num_items} rows can be used. All reasons: {folder / BAD_ROWS}{listed}")
    write_meta(folder, records)
    prepared = Prepared(
        folder=folder,
        format=name,
        num_items=num_items,
        num_samples=num_samples,
        num_images=sum(record.num_images for record in records),
        num_shards=sum(bool(record.samples) for record in records),
        num_bad_rows=len(rows),
        num_bad_images=len(left_out) - len(rows),
        reasons=dict(Counter(row.reason for row in left_out).most_common()),
        num_shards_found=num_found,
    )
    summary = {key: value for key, value in asdict(prepared).items() if key not in ("folder", "num_shards_found")}
    durable.replace_file(folder / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    return prepared
