"""Make a run folder of a Q-Former and its text side that start from BERT, as BLIP-2's first stage does.

    python tools/qformer_from_bert.py BERT_FOLDER examples/blip2/blip2_stage1.yaml runs/qformer_bert

``BERT_FOLDER`` is Hugging Face's, with safetensors. A recipe starts from the run folder by
``checkpoint.pretrained_checkpoint``; what BERT does not have is drawn by the seed of the recipe given here.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megavlm.config import load_recipe
from megavlm.convert.bert import start_from_bert
from megavlm.recipe import Recipe
from megavlm.runtime.process import process


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and write the run folder."""
    parser = argparse.ArgumentParser(description="A Q-Former and its text side that start from BERT.")
    parser.add_argument("source", type=Path, help="BERT's Hugging Face folder")
    parser.add_argument("recipe", type=Path, help="recipe of BLIP-2's first stage")
    parser.add_argument("target", type=Path, help="run folder to make")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    options = parser.parse_args(arguments)
    try:
        with process(timeout_minutes=1):
            start_from_bert(options.source, load_recipe(options.recipe, options.overrides, Recipe), options.target)
    except ValueError as error:
        sys.exit(f"qformer_from_bert: error: {error}")
    print(f"{options.target}/release")


if __name__ == "__main__":
    main()
