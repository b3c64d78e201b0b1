"""Starting a command as several ranks on this machine."""

import argparse
import logging
import os
import sys

from torch.distributed.run import main as torchrun

from megavlm.build import build_processor, check_run
from megavlm.recipe import Recipe


def add_ranks(verb: argparse.ArgumentParser) -> None:
    """Add ``--nproc-per-node``."""
    verb.add_argument(
        "--nproc-per-node", type=int, default=1, metavar="N", help="start N ranks on this machine (default: 1)"
    )


def world_size(options: argparse.Namespace) -> int:
    """Ranks of the run: of the launcher, or those that are asked for."""
    return int(os.environ.get("WORLD_SIZE", options.nproc_per_node))


def must_start_ranks(options: argparse.Namespace) -> bool:
    """Whether this process is to start ranks instead of being one.

    Raises:
        ValueError: fewer than one is asked for.
    """
    if options.nproc_per_node < 1:
        raise ValueError(f"--nproc-per-node={options.nproc_per_node}: must be at least 1.")
    return options.nproc_per_node > 1 and "RANK" not in os.environ


def start_ranks(recipe: Recipe, num_ranks: int) -> None:
    """Run this same command line under torchrun, which gives every rank its number and ends all if one fails.

    What can be checked without ranks is checked first: one error instead of one from each of them.
    """
    check_run(recipe, num_ranks)
    build_processor(recipe)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    torchrun(["--standalone", "--nproc-per-node", str(num_ranks), "-m", "megavlm", *sys.argv[1:]])
