"""``megavlm preflight`` and ``megavlm record``: what comes before a run on a cluster."""

import argparse
import os
import sys
from pathlib import Path

from megavlm.build import check_run
from megavlm.cli.argument import add_recipe, add_verb
from megavlm.cli.ranks import add_ranks, must_start_ranks, start_ranks, world_size
from megavlm.config import load_recipe
from megavlm.preflight.record import record_folder, shell_variables, write_record
from megavlm.preflight.run import run_preflight
from megavlm.recipe import Recipe


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verbs."""
    verb = add_verb(verbs, "preflight", _preflight, "check in seconds that all ranks of a run can work together")
    add_recipe(verb)
    add_ranks(verb)
    verb.add_argument(
        "--timeout-seconds", type=float, default=60.0, metavar="S", help="for the ranks to start and answer"
    )

    verb = add_verb(verbs, "record", _record, "write down recipe, code, packages and environment of a run to come")
    add_recipe(verb)
    verb.add_argument("--folder", type=Path, help="where to (default: jobs/JOB/attempt_N in the run folder)")


def _preflight(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides, Recipe)
    check_run(recipe, world_size(options))
    if must_start_ranks(options):
        start_ranks(recipe, options.nproc_per_node)
        return
    is_ready = run_preflight(recipe, timeout_seconds=options.timeout_seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if is_ready else 1)  # a thread may still hang in what did not answer


def _record(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides, Recipe)
    folder = options.folder or record_folder(recipe, os.environ)
    write_record(recipe, sys.argv[1:], os.environ, folder.absolute())
    print(shell_variables(recipe, folder.absolute()), end="")
