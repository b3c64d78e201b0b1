"""A trained run, ready to answer."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from megavlm.build import Parts, build_parts
from megavlm.checkpoint import RunFolder, load_checkpoint
from megavlm.config import load_recipe
from megavlm.recipe import Recipe
from megavlm.runtime.log import start_log
from megavlm.runtime.process import Process, process

FOR_GENERATION = (
    "engine.sequence_parallel=false",
    "engine.virtual_pipeline_model_parallel_size=null",
    "engine.expert_model_parallel_size=1",  # data-parallel ranks answer different questions, each at its own pace
    "engine.expert_tensor_parallel_size=null",
)
"""What a layout may not have where tokens are generated one at a time."""


def find_run(options: argparse.Namespace) -> tuple[Path, Recipe]:
    """The newest checkpoint of a run folder, and its recipe for generation.

    Raises:
        ValueError: the folder holds no checkpoint.
    """
    folder = RunFolder(options.folder)
    newest = folder.newest()
    if newest is None:
        raise ValueError(f"folder={options.folder}: holds no checkpoint. Give the run folder of a trained stage.")
    checkpoint = folder.checkpoint(newest)
    recipe = load_recipe(checkpoint / "recipe.yaml", [*options.overrides, *FOR_GENERATION], Recipe)
    # masks of padding and single tokens are nothing for fused kernels and FP8, and so it runs everywhere
    return checkpoint, recipe.model_copy(update={"engine": recipe.engine.on_any_machine()})


@contextlib.contextmanager
def loaded_run(checkpoint: Path, recipe: Recipe) -> Iterator[tuple[Parts, Process]]:
    """This rank's part of a trained model, ready to answer."""
    with process(timeout_minutes=recipe.engine.distributed_timeout_minutes) as me:
        start_log(me.rank, checkpoint.parent / "log.txt")
        parts = build_parts(recipe, world_size=me.world_size)
        parts.engine.wrap(parts.build_chunks(), training=False)
        load_checkpoint(checkpoint, parts.engine, with_optimizer=False, verify=recipe.checkpoint.verify)
        yield parts, me
