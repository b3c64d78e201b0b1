"""``megavlm train``."""

import argparse
import os
import shutil
from pathlib import Path

from megavlm.build import check_run
from megavlm.checkpoint.durable import NO_SPACE
from megavlm.cli.argument import add_recipe, add_verb
from megavlm.cli.ranks import add_ranks, must_start_ranks, start_ranks, world_size
from megavlm.config import dump_recipe, load_recipe
from megavlm.recipe import Recipe
from megavlm.runtime.log import start_log
from megavlm.runtime.process import process
from megavlm.training.loop import train


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "train", _train, "run (or resume) one stage of training")
    add_recipe(verb)
    add_ranks(verb)
    verb.add_argument("--dry-run", action="store_true", help="check and print the resolved recipe, train nothing")


def _train(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides, Recipe)
    if options.dry_run:
        check_run(recipe, world_size(options))
        print(dump_recipe(recipe), end="")
        return
    _make_run_folder(recipe.checkpoint.save)
    if must_start_ranks(options):
        start_ranks(recipe, options.nproc_per_node)
        return
    with process(timeout_minutes=recipe.engine.distributed_timeout_minutes) as me:
        start_log(me.rank, recipe.checkpoint.save / "log.txt")
        try:
            train(recipe, me)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise ValueError(_no_space(recipe.checkpoint.save, error)) from error


def _no_space(folder: Path, error: OSError) -> str:
    """What to tell when something else than a checkpoint, such as the metrics, did not fit on the disk."""
    free = shutil.disk_usage(folder).free
    return (
        f"checkpoint.save={folder}: no space left on the disk for {error.filename or 'metrics and pictures'}: {free} "
        "bytes are free. Make room, or save elsewhere; the same command resumes the run from its newest checkpoint."
    )


def _make_run_folder(path: Path) -> None:
    """Make the run folder, or say now that it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"checkpoint.save={path}: cannot be made ({error.strerror}). Choose another folder.") from None
    if not os.access(path, os.W_OK):
        raise ValueError(f"checkpoint.save={path}: may not be written to. Choose another folder.")
