"""``megavlm convert``."""

import argparse
from pathlib import Path

from megavlm.cli.argument import add_verb
from megavlm.cli.without_cuda import restart_without_cuda
from megavlm.convert.folder import LORA, convert_folder
from megavlm.convert.receipt import make_receipt
from megavlm.convert.to_hf import DTYPES
from megavlm.runtime.log import start_log


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "convert", _convert, "make a run folder of a Hugging Face folder, or the other way")
    verb.add_argument(
        "source", type=Path, help="Hugging Face folder (config.json, *.safetensors), run folder, checkpoint"
    )
    verb.add_argument("target", type=Path, help="the folder to make: a run folder, or a Hugging Face folder")
    verb.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe, or to config.json's model"
    )
    verb.add_argument("--recipe", type=Path, help="from Hugging Face: the recipe of the model (default: config.json's)")
    verb.add_argument(
        "--part",
        choices=("language", "vision", LORA),
        help="to Hugging Face: this part alone; lora: an adapter folder for peft (all else is written merged)",
    )
    verb.add_argument(
        "--architecture", metavar="CLASS", help="to Hugging Face: write for this class, or say why it cannot be"
    )
    verb.add_argument("--max-shard-size", metavar="SIZE", help="to Hugging Face: most bytes of a file (default: 2GB)")
    verb.add_argument(
        "--dtype", choices=sorted(DTYPES), help="to Hugging Face: type of the weights (default: as saved)"
    )
    receipt = verb.add_mutually_exclusive_group()
    receipt.add_argument(
        "--verify", action="store_true", help="then compare tensors and outputs of both; receipt.md in the target"
    )
    receipt.add_argument(
        "--verify-only", action="store_true", help="the same for a target that is there already; converts nothing"
    )


def _convert(options: argparse.Namespace) -> None:
    restart_without_cuda()
    start_log()
    if options.verify and options.part == LORA:
        raise ValueError("--verify: compares models, and --part=lora writes none. Leave it out.")
    if options.verify_only:
        _refuse_settings(options)
    else:
        convert_folder(
            options.source,
            options.target,
            options.overrides,
            recipe=options.recipe,
            part=options.part,
            architecture=options.architecture,
            max_shard_size=options.max_shard_size,
            dtype=options.dtype,
        )
    if options.verify or options.verify_only:
        receipt = make_receipt(options.source, options.target, options.overrides)
        receipt.print()
        receipt.require()


def _refuse_settings(options: argparse.Namespace) -> None:
    """Refuse what only a conversion can use."""
    for name in ("recipe", "part", "architecture", "max_shard_size", "dtype"):
        if (value := getattr(options, name)) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}={value}: is for a conversion, and --verify-only makes none. Leave it out."
            )
