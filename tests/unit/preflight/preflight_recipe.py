"""A recipe whose files exist, for the tests of this folder."""

from pathlib import Path

from megavlm.config import load_recipe
from megavlm.recipe import Recipe

EXAMPLES = Path(__file__).parents[3] / "examples"


def recipe_in(folder: Path, *overrides: str) -> Recipe:
    """The tiny NVLM-D with data, tokenizer and run folder in ``folder``."""
    for name in ("train.jsonl", "valid.jsonl", "tokenizer.model"):
        (folder / name).write_text(name, encoding="utf-8")
    here = [
        f"data.train.path={folder / 'train.jsonl'}",
        f"data.valid.path={folder / 'valid.jsonl'}",
        f"tokenizer.path={folder / 'tokenizer.model'}",
        f"checkpoint.save={folder / 'run'}",
    ]
    return load_recipe(EXAMPLES / "nvlm" / "tiny.yaml", [*here, *overrides], Recipe)
