"""``megavlm plan``."""

import argparse

from megavlm.cli.argument import add_recipe, add_verb
from megavlm.config import load_recipe
from megavlm.planning.table import print_plan
from megavlm.recipe import Recipe


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb."""
    add_recipe(add_verb(verbs, "plan", _plan, "count a recipe's parameters and operations, without memory for them"))


def _plan(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides, Recipe)
    print_plan(recipe)
