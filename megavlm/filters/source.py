"""What a filter reads, and how it says what is kept. The data itself is never changed."""

import json
from collections.abc import Sequence
from pathlib import Path

from megavlm.checkpoint import durable
from megavlm.data.datasets import Dataset, JsonDatasetConfig, JsonlDatasetConfig, ShardsDataset, ShardsDatasetConfig

KEEP_NAME = "keep.txt"
KEPT_NAME = "kept.jsonl"


def open_source(path: Path, image_root: Path | None = None) -> Dataset:
    """Open shards, or a JSON or JSONL file, rows that cannot be used left out.

    Args:
        path: a folder of shards, a ``.tar``, ``.json`` or ``.jsonl`` file.
        image_root: where the relative paths of a file's images begin.

    Raises:
        ValueError: it is none of these, or cannot be used.
    """
    if path.is_dir() or path.suffix == ".tar":
        return ShardsDatasetConfig(path=path, bad_rows="skip").build()
    if path.suffix.lower() == ".jsonl":
        return JsonlDatasetConfig(path=path, image_root=image_root, bad_rows="skip").build()
    if path.suffix.lower() == ".json":
        return JsonDatasetConfig(path=path, image_root=image_root, bad_rows="skip").build()
    raise ValueError(f"source={path}: is no folder of shards and no .json or .jsonl file. Prepare it first.")


def write_kept(folder: Path, dataset: Dataset, numbers: Sequence[int]) -> Path:
    """Write which samples are kept, so that a recipe can name it.

    Args:
        folder: of the filter.
        dataset: of :func:`open_source`.
        numbers: of the samples, in their order.

    Returns:
        ``keep.txt``, for the ``keep`` of a shards data set; or ``kept.jsonl``, the rows of a file, for which the
        recipe's ``image_root`` must be the one of that file.

    Raises:
        ValueError: the file has changed since it was opened.
    """
    if isinstance(dataset, ShardsDataset):
        path = folder / KEEP_NAME
        lines = [dataset.sample_name(number) for number in numbers]
    else:
        path = folder / KEPT_NAME
        lines = [json.dumps(row) for row in _rows([dataset[number][0] for number in numbers])]
    durable.replace_file(path, "".join(f"{line}\n" for line in lines).encode())
    return path


def _rows(keys: Sequence[str]) -> list[object]:
    """The decoded rows that keys name: ``rows.json[4]`` or ``rows.jsonl:5``."""
    if not keys:
        return []
    if keys[0].endswith("]"):
        path, places = Path(keys[0].rpartition("[")[0]), [int(key.rpartition("[")[2][:-1]) for key in keys]
        rows = json.loads(path.read_bytes())
        return [rows[place] for place in places]
    path, wanted = Path(keys[0].rpartition(":")[0]), {int(key.rpartition(":")[2]) for key in keys}
    with open(path, encoding="utf-8-sig") as file:
        return [json.loads(line) for number, line in enumerate(file, start=1) if number in wanted]
