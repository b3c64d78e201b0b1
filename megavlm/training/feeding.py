"""What a run trains and validates on: its data sets, opened, and what makes batches of them."""

from collections.abc import Iterator, Mapping
from typing import Any

from megavlm.batch import Batch
from megavlm.build import Parts
from megavlm.data import (
    Blend,
    Dataset,
    Loader,
    PackedLoader,
    Progress,
    balanced_order,
    costs_of,
    describe_changes,
    order_facts,
)
from megavlm.data.config import TrainDataConfig
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER


def open_data(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """Open training and validation data; rows that cannot be used are told now."""

    def open_one(config: TrainDataConfig) -> Dataset:
        dataset = config.build()
        LOGGER.info("%d samples in %s, %d unusable rows left out", len(dataset), config.name, dataset.num_bad_rows)
        if isinstance(dataset, Blend):
            shares = ", ".join(f"{name} {100.0 * share:.2f}%" for name, share in dataset.shares().items())
            LOGGER.info("shares of the samples: %s", shares)
        for row in dataset.bad_rows:
            LOGGER.warning("unusable row: %s", row)
        return dataset

    return open_one(recipe.data.train), open_one(recipe.data.valid) if recipe.data.valid else None


def data_order_of(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """What the order of a run's training samples depends on."""
    names = recipe.data.train.source_names
    return order_facts(dataset, names, seed=recipe.training.seed, shuffle=recipe.data.shuffle)


def tell_other_order(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Warn where a resumed run has other data than it had, so that its place in them means other samples.

    Args:
        before: of the checkpoint; None: it does not say.
        now: of this run; None on ranks that read no data.
    """
    if before is not None and now is not None and (changes := describe_changes(before, now)):
        LOGGER.warning(
            "the training data are not those of the checkpoint: %s. The run goes on at its place in the new order of"
            " samples: some that it has used come again before the others",
            "; ".join(changes),
        )


def build_training_loader(parts: Parts, dataset: Dataset, progress: Progress | None = None) -> Loader | PackedLoader:
    """Make the endless loader of training data, packed or not, as the recipe says.

    Args:
        parts: of the run.
        dataset: opened.
        progress: where to begin; None: with the first sample.
    """
    recipe = parts.recipe
    settings: dict[str, Any] = {
        **_sizes(parts),
        "seed": recipe.training.seed,
        "shuffle": recipe.data.shuffle,
        "num_workers": recipe.data.num_workers,
        "progress": progress,
        "timeout_seconds": recipe.data.worker_timeout_seconds,
    }
    processor = parts.processor.for_training(recipe.training.seed)
    if recipe.data.packing is not None:
        return PackedLoader(dataset, processor, recipe.data.packing, **settings)
    return Loader(dataset, processor, **settings)


def build_validation_loader(parts: Parts, dataset: Dataset) -> Loader:
    """Make the loader of single passes over validation data, one sample in a row."""
    return Loader(
        dataset, parts.processor, seed=parts.recipe.training.seed, shuffle=False, endless=False, **_sizes(parts)
    )


def _sizes(parts: Parts) -> dict[str, Any]:
    training, engine = parts.recipe.training, parts.engine
    return {
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "data_parallel_rank": engine.data_parallel_rank,
        "data_parallel_size": engine.data_parallel_size,
        "pad_multiple": parts.pad_multiple,
    }


def training_steps(parts: Parts, loader: Loader | PackedLoader) -> Iterator[list[Batch]]:
    """The micro-batches of each step, in the order in which the pipeline takes them."""
    balancing = parts.recipe.data.balancing
    num_stages = parts.recipe.engine.pipeline_model_parallel_size
    for batches in loader:
        if balancing is not None:
            batches = [batches[number] for number in balanced_order(costs_of(batches, balancing), num_stages)]
        yield batches
