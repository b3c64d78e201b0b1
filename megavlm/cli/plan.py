"""``megavlm plan``."""

import argparse

from megavlm.cli.argument import add_recipe, add_verb
from megavlm.cli.without_cuda import restart_without_cuda
from megavlm.config import load_recipe
from megavlm.planning.modules import print_modules
from megavlm.planning.table import print_plan
from megavlm.recipe import Recipe


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "plan", _plan, "count a recipe's parameters and operations, without memory for them")
    add_recipe(verb)
    verb.add_argument(
        "--world-size", type=int, metavar="N", help="ranks of the run, to see the memory of each with this layout"
    )
    verb.add_argument(
        "--modules", action="store_true", help="list the modules of each part, as training.trainable_within names them"
    )


def _plan(options: argparse.Namespace) -> None:
    if options.world_size is not None and options.world_size < 1:
        raise ValueError(f"--world-size={options.world_size}: must be at least 1.")
    restart_without_cuda()
    recipe = load_recipe(options.recipe, options.overrides, Recipe)
    print_plan(recipe, options.world_size)
    if options.modules:
        print_modules(recipe)
