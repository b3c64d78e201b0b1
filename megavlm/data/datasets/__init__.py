"""The datasets: rows of conversations, by number. One file per kind, and the dict of kinds."""

from typing import Annotated, Protocol

import pydantic

from megavlm.config import Config
from megavlm.data.conversation import Conversation
from megavlm.data.datasets.json import JsonDataset, JsonDatasetConfig
from megavlm.data.datasets.jsonl import JsonlDataset, JsonlDatasetConfig
from megavlm.data.datasets.shards import ShardsDataset, ShardsDatasetConfig


class Dataset(Protocol):
    """What every dataset offers. Pickled into the loader's workers."""

    num_bad_rows: int
    """Rows that were left out at opening because they cannot be used."""
    bad_rows: list[str]
    """The first ten of them: where each stands and what is wrong."""

    def __len__(self) -> int:
        """Usable rows."""

    def __getitem__(self, index: int) -> tuple[str, Conversation]:
        """Read a row again: its key (``file.jsonl:17``) and conversation.

        Raises:
            ValueError: the file has changed since it was opened, and the row cannot be used any more.
        """


class DatasetKind(Protocol):
    """What the config class of each kind offers."""

    kind: str

    @property
    def name(self) -> str:
        """What logs call it."""

    @property
    def source_names(self) -> list[str]:
        """Names of its data sources, in the order of ``Batch.sources``: its own, where it is no blend."""

    def build(self) -> Dataset:
        """Open the dataset and check every row; ``ValueError`` where it cannot be used."""


DATASETS: dict[str, type[Config]] = {
    "jsonl": JsonlDatasetConfig,
    "json": JsonDatasetConfig,
    "shards": ShardsDatasetConfig,
}

DatasetConfig = Annotated[
    JsonlDatasetConfig | JsonDatasetConfig | ShardsDatasetConfig, pydantic.Field(discriminator="kind")
]

__all__ = [
    "DATASETS",
    "Dataset",
    "DatasetConfig",
    "DatasetKind",
    "JsonDataset",
    "JsonDatasetConfig",
    "JsonlDataset",
    "JsonlDatasetConfig",
    "ShardsDataset",
    "ShardsDatasetConfig",
]
