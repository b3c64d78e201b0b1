"""What the padding of an FP8 run costs: the legal row lengths, and the share of them that is waste."""

from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.build import build_processor
from megavlm.data import SampleProcessor
from megavlm.data.datasets import Dataset
from megavlm.data.sample import SampleError
from megavlm.engines.fp8 import check_sides, padding_share
from megavlm.models.products import product_sides
from megavlm.recipe import Recipe

_MOST_ROWS = 256


@dataclass(frozen=True)
class Padding:
    """What a recipe's rows are padded to."""

    multiple: int
    """Rows and contexts are padded to a multiple of it."""
    multiple_without_fp8: int
    full_row: int
    """Positions of a row of ``data.seq_length`` tokens."""
    waste_of_full_row: float
    """Share of those that are padding."""
    num_rows: int
    """Rows of the recipe's data that were measured; 0 where the data is not here."""
    waste_of_rows: float
    """Share of their positions that this padding adds, each row by itself."""
    waste_of_rows_without_fp8: float


def plan_padding(recipe: Recipe) -> Padding:
    """Say what the rows of a recipe are padded to, and measure its first rows if its data and tokenizer are here.

    Raises:
        ValueError: a product of a part that computes in FP8 has an illegal shape. Names each.
    """
    fp8 = recipe.engine.active_fp8
    if fp8 is not None:
        check_sides(fp8, product_sides(recipe.model, recipe.engine.tensor_model_parallel_size))
    multiple = recipe.engine.pad_multiple
    without = recipe.engine.model_copy(update={"precision": "bf16"}).pad_multiple
    length = recipe.data.seq_length
    lengths = list(_row_lengths(recipe))
    return Padding(
        multiple=multiple,
        multiple_without_fp8=without,
        full_row=-(-length // multiple) * multiple,
        waste_of_full_row=padding_share([length], multiple),
        num_rows=len(lengths),
        waste_of_rows=padding_share(lengths, multiple),
        waste_of_rows_without_fp8=padding_share(lengths, without),
    )


def _row_lengths(recipe: Recipe) -> Iterator[int]:
    """Tokens of the first usable samples."""
    try:
        processor, dataset = build_processor(recipe), recipe.data.train.build()
    except ValueError:
        return  # planned on another machine than it will run on
    yield from _measured(processor, dataset)


def _measured(processor: SampleProcessor, dataset: Dataset) -> Iterator[int]:
    for index in range(min(_MOST_ROWS, len(dataset))):
        try:
            yield processor.measure(*dataset[index])[0]
        except SampleError:
            continue  # training leaves it out and counts it
