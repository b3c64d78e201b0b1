"""Writes one shard: a tar file whose samples stand one behind the other, its index, and a record of what went in."""

import json
import os
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

from megavlm.checkpoint import durable
from megavlm.prepare.item import Format, Item, RowError
from megavlm.prepare.sample import ImageLimits, ShardSample, make_sample

_BLOCK = 512


@dataclass
class SampleEntry:
    """Where a sample stands in its shard, in bytes."""

    key: str
    offset: int
    size: int
    parts: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, offset and length of the content of each of its files."""


@dataclass
class BadRow:
    """A row, or an image of a document, that was left out."""

    where: str
    reason: str
    message: str
    is_image: bool = False
    """Whether only the image was left out; its document went on without it."""


@dataclass
class ShardRecord:
    """What a shard holds, and what it had to leave out."""

    number: int
    num_bytes: int = 0
    """Of the tar file; 0: no row could be used, and there is none."""
    num_images: int = 0
    samples: list[SampleEntry] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the tar file."""
        return shard_name(self.number)

    def to_json(self) -> bytes:
        """As it is kept on disk."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(content: bytes) -> "ShardRecord":
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: it is damaged.
        """
        tree = json.loads(content)
        tree["samples"] = [
            SampleEntry(**{**entry, "parts": [tuple(part) for part in entry["parts"]]}) for entry in tree["samples"]
        ]
        tree["bad_rows"] = [BadRow(**row) for row in tree["bad_rows"]]
        return ShardRecord(**tree)


def shard_name(number: int) -> str:
    """Name of the tar file of a shard."""
    return f"shard-{number:06d}.tar"


def write_shard(folder: Path, number: int, items: Sequence[Item], format_: Format, limits: ImageLimits) -> ShardRecord:
    """Write a shard of some items, in their order; ``*.tar`` and ``*.tar.idx`` appear when they are complete.

    The bytes depend on the items alone.

    Args:
        folder: where to.
        number: of the shard.
        items: of the source.
        format_: reads them.
        limits: which images are taken.

    Raises:
        OSError: the folder cannot be written to.
    """
    record = ShardRecord(number)
    path = folder / record.name
    new = path.with_name(f"{path.name}.writing")
    with open(new, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for item in items:
                for sample in _samples(item, format_, limits, record):
                    _add(archive, record, sample)
            end = archive.offset
        file.flush()
        os.fsync(file.fileno())
        record.num_bytes = file.tell() if record.samples else 0
    if not record.samples:
        new.unlink()
        return record
    offsets = [*(entry.offset for entry in record.samples), end]
    durable.replace_file(path.with_name(f"{path.name}.idx"), struct.pack(f"<{len(offsets)}Q", *offsets))
    os.replace(new, path)
    durable.sync(folder)
    return record


def _samples(item: Item, format_: Format, limits: ImageLimits, record: ShardRecord) -> list[ShardSample]:
    """The samples of an item; what cannot be used goes into the record."""
    samples = []
    try:
        rows = format_.rows(item)
    except RowError as error:
        record.bad_rows.append(BadRow(error.where, error.reason, error.message))
        return []
    if not rows:
        record.bad_rows.append(BadRow(item.where, "row_malformed", "holds no text."))
    for row in rows:
        try:
            sample = make_sample(row, limits)
        except RowError as error:
            record.bad_rows.append(BadRow(error.where, error.reason, error.message))
            continue
        record.bad_rows += [BadRow(error.where, error.reason, error.message, True) for error in sample.left_out]
        samples.append(sample)
    return samples


def _add(archive: tarfile.TarFile, record: ShardRecord, sample: ShardSample) -> None:
    key = f"{record.number:06d}_{len(record.samples):06d}"
    entry = SampleEntry(key, archive.offset, 0)
    for name, content in {"json": sample.row, **sample.images}.items():
        member = tarfile.TarInfo(f"{key}.{name}")  # no owner, no time: the same rows give the same bytes
        member.size = len(content)
        entry.parts.append((name, archive.offset + _BLOCK, len(content)))
        archive.addfile(member, BytesIO(content))
    entry.size = archive.offset - entry.offset
    record.samples.append(entry)
    record.num_images += len(sample.images)
