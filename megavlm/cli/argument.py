"""Arguments that several verbs have."""

import argparse
from pathlib import Path


def add_verb(verbs: argparse._SubParsersAction, name: str, run: object, text: str) -> argparse.ArgumentParser:
    """Add a verb that runs ``run(options)``; ``text`` says what it does."""
    verb = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    verb.set_defaults(run=run)
    return verb


def add_recipe(verb: argparse.ArgumentParser) -> None:
    """Add a recipe and its overrides."""
    verb.add_argument("recipe", type=Path, help="recipe file")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to it, e.g. training.seed=7")


def add_run_folder(verb: argparse.ArgumentParser) -> None:
    """Add the folder of a trained run and the overrides of its recipe."""
    verb.add_argument("folder", type=Path, help="run folder with a checkpoint")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the run's recipe")
