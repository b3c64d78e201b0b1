"""The ``megavlm`` command: one file for each verb.

A recipe and ``key.path=value`` overrides say the rest. ``--nproc-per-node N`` starts N ranks on this machine; under
torchrun or srun the verb is one of the ranks.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megavlm import __version__
from megavlm.runtime.log import quiet_third_parties

_FILES = {
    "train": "train",
    "eval": "evaluate",
    "generate": "generate",
    "plan": "plan",
    "preflight": "preflight",
    "record": "preflight",
    "convert": "convert",
    "upcycle": "upcycle",
    "soup": "soup",
    "transfer": "transfer",
    "bench": "bench",
    "data": "data",
    "doctor": "doctor",
}
"""Verb -> its file here. Only the file of the verb that is asked for is imported: each rank starts with it, and all of
them take half as long again."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with 0, with 1 after an error, or with 2 when the command line is wrong.

    What a user can mend ends in one line; ``MEGAVLM_TRACEBACK=1`` shows where it was raised.
    """
    try:
        options = _parse(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("megavlm"):
            raise
        sys.exit(f"megavlm: error: {error.name} is not installed. pip install -c constraints.txt -r requirements.txt")
    quiet_third_parties()
    try:
        options.run(options)
    except ValueError as error:
        if os.environ.get("MEGAVLM_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"[rank {rank}] "
        sys.exit(f"{where}megavlm {options.verb}: error: {error}")
    except ChildFailedError as error:
        sys.exit(max(1, error.get_first_failure()[1].exitcode))  # the ranks have said why
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Overrides may stand anywhere after the recipe, between options too."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(given[0] if given else "")
    options, rest = parser.parse_known_args(arguments)
    if unknown := [text for text in rest if text.startswith("-") or not hasattr(options, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb, or of all where it is none: for the help and for errors."""
    parser = argparse.ArgumentParser(prog="megavlm", description="Trains vision-language models on megatron-core.")
    parser.add_argument("--version", action="version", version=f"megavlm {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for file in [_FILES[verb]] if verb in _FILES else dict.fromkeys(_FILES.values()):
        importlib.import_module(f"megavlm.cli.{file}").add(verbs)
    return parser
