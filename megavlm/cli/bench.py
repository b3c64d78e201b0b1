"""``megavlm bench speed``, ``compare`` and ``layouts``."""

import argparse
import sys
from pathlib import Path

from megavlm.benchmark.child import RunError
from megavlm.benchmark.compare import compare
from megavlm.benchmark.speed import measure_speed, print_speed, write_speed
from megavlm.benchmark.sweep_run import Place, run_sweep
from megavlm.cli.argument import add_recipe, add_verb
from megavlm.cli.ranks import add_ranks, must_start_ranks, start_ranks
from megavlm.config import load_recipe
from megavlm.recipe import Recipe
from megavlm.runtime.log import start_log
from megavlm.runtime.process import process


def add(parent: argparse._SubParsersAction) -> None:
    """Add the verbs."""
    bench = add_verb(parent, "bench", None, "time a recipe or its layouts, or compare variants of recipes")
    verbs = bench.add_subparsers(dest="bench_verb", required=True, metavar="WHAT")

    verb = add_verb(verbs, "speed", _speed, "time some training steps of a recipe; save nothing")
    verb.set_defaults(verb="bench speed")
    add_recipe(verb)
    add_ranks(verb)
    verb.add_argument("--steps", type=int, default=5, help="steps that are timed")
    verb.add_argument("--warmup-steps", type=int, default=2, help="steps before them")
    verb.add_argument("--detail", action="store_true", help="also what a step's time and operations go to, and MFU")
    verb.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")

    verb = add_verb(verbs, "compare", _compare, "train, evaluate and time variants of recipes, in one table")
    verb.set_defaults(verb="bench compare")
    verb.add_argument("file", type=Path, help="the comparison: stages, variants, seeds, save (YAML)")
    verb.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="model.*, data.*, training.* and other parts of a recipe: for every stage of every variant, above the "
        "variant's own; save, seeds, speed.rounds and other keys of the comparison: for the comparison",
    )
    add_ranks(verb)
    verb.add_argument("--quiet", action="store_true", help="send the runs' output to output.txt in their folders")

    verb = add_verb(verbs, "layouts", _layouts, "time layouts of a recipe on several numbers of ranks, in one table")
    verb.set_defaults(verb="bench layouts")
    verb.add_argument("file", type=Path, help="the sweep: recipe, layouts, grid, nodes, save (YAML)")
    verb.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="parts of a recipe: for every row, above its own; save, nodes and other keys of the sweep: for the sweep",
    )
    add_ranks(verb)
    verb.add_argument("--num-nodes", type=int, default=1, metavar="N", help="nodes that the launcher has (default: 1)")
    verb.add_argument(
        "--launcher",
        default="",
        metavar="COMMAND",
        help="runs `python -m megavlm ...` on several nodes; called as COMMAND NODES RANKS_PER_NODE -m megavlm ... "
        "(default: torchrun on this machine)",
    )
    verb.add_argument("--again", action="store_true", help="run rows again that did not end well")


def _speed(options: argparse.Namespace) -> None:
    for name, value, least in (("steps", options.steps, 1), ("warmup-steps", options.warmup_steps, 0)):
        if value < least:
            raise ValueError(f"--{name}={value}: must be at least {least}.")
    recipe = load_recipe(options.recipe, options.overrides, Recipe)
    if must_start_ranks(options):
        start_ranks(recipe, options.nproc_per_node)
        return
    with process(timeout_minutes=recipe.engine.distributed_timeout_minutes) as me:
        start_log(me.rank)
        speed = measure_speed(
            recipe,
            me,
            num_steps=options.steps,
            num_warmup_steps=options.warmup_steps,
            is_detailed=options.detail,
        )
        if me.rank == 0:
            print_speed(speed)
            if options.json is not None:
                write_speed(speed, options.json)


def _compare(options: argparse.Namespace) -> None:
    if options.nproc_per_node < 1:
        raise ValueError(f"--nproc-per-node={options.nproc_per_node}: must be at least 1.")
    try:
        compare(options.file, options.overrides, num_ranks=options.nproc_per_node, is_quiet=options.quiet)
    except RunError as error:
        print(f"megavlm {options.verb}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _layouts(options: argparse.Namespace) -> None:
    place = Place(options.num_nodes, options.nproc_per_node, options.launcher)
    try:
        run_sweep(options.file, options.overrides, place, is_again=options.again)
    except RunError as error:
        print(f"megavlm {options.verb}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
