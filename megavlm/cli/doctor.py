"""``megavlm doctor``."""

import argparse
import sys
from pathlib import Path

from megavlm.cli.argument import add_verb
from megavlm.config import load_recipe
from megavlm.doctor.examination import examine, print_examination, to_json
from megavlm.recipe import Recipe


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "doctor", _doctor, "say what is installed, whether it fits, and what a recipe will run on")
    verb.add_argument("recipe", type=Path, nargs="?", help="recipe file (default: what every recipe starts from)")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to it, e.g. engine.precision=fp8")
    verb.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _doctor(options: argparse.Namespace) -> None:
    recipe = None
    if options.recipe is not None:
        recipe = load_recipe(options.recipe, options.overrides, Recipe)
    examination = examine(recipe)
    if options.json:
        print(to_json(examination))
    else:
        print_examination(examination)
    sys.exit(1 if examination.problems else 0)
