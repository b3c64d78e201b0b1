"""The files by which megatron-energon knows a folder of shards, as version 7 writes them.

``.nv-meta/dataset.yaml`` says that samples are crude: a reader gets the members of each as they are. ``split.yaml``
puts all shards into ``train``; ``.info.json`` counts their samples; ``index.sqlite`` says where each member stands.
"""

import json
import sqlite3
import uuid
from collections.abc import Sequence
from pathlib import Path

import yaml

from megavlm.checkpoint import durable
from megavlm.prepare.shard import ShardRecord

FOLDER = ".nv-meta"
_VERSION = "7.4.1"
_TABLES = """
CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL,
    byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER,
    content_byte_size INTEGER);
"""
_INDICES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full
    ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


def write_meta(folder: Path, records: Sequence[ShardRecord]) -> None:
    """Write ``.nv-meta`` for the shards of a folder; those without samples are not among them.

    Raises:
        OSError: the folder cannot be written to.
    """
    meta = folder / FOLDER
    meta.mkdir(exist_ok=True)
    shards = [record for record in records if record.samples]
    names = [record.name for record in shards]
    counts = {record.name: len(record.samples) for record in shards}
    _write_index(meta / "index.sqlite", shards)
    texts = {
        "index.uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(counts))),
        "dataset.yaml": yaml.safe_dump(
            {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}, sort_keys=False
        ),
        "split.yaml": yaml.safe_dump(
            {"split_parts": {"train": names, "val": [], "test": []}, "exclude": []}, sort_keys=False
        ),
        ".info.json": json.dumps({"energon_version": _VERSION, "shard_counts": counts}, indent=2),
    }
    for name, text in texts.items():
        durable.replace_file(meta / name, text.encode())


def _write_index(path: Path, shards: Sequence[ShardRecord]) -> None:
    new = path.with_name(f"{path.name}.writing")
    new.unlink(missing_ok=True)
    database = sqlite3.connect(new)
    try:
        database.executescript(_TABLES)
        for number, shard in enumerate(shards):
            database.executemany(
                "INSERT INTO samples VALUES (?, ?, ?, ?, ?)",
                [(number, entry.key, place, entry.offset, entry.size) for place, entry in enumerate(shard.samples)],
            )
            database.executemany(
                "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)",
                [(number, place, *part) for place, entry in enumerate(shard.samples) for part in entry.parts],
            )
        database.executescript(_INDICES)
        database.commit()
    finally:
        database.close()
    new.replace(path)
