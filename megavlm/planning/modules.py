"""What ``megavlm plan --modules`` prints: the modules of each part, by the names for ``training.trainable_within``."""

import re
from collections import Counter, defaultdict

from rich.console import Console
from rich.table import Table

from megavlm.models.part import PARTS, part_of
from megavlm.planning.parameters import build_whole, recipe_vocab_size
from megavlm.recipe import Recipe

_LAYER = re.compile(r"(?<=layers\.)\d+")


def print_modules(recipe: Recipe) -> None:
    """Print the modules of each part, how many parameters they have and how many of them train.

    Raises:
        ValueError: the tokenizer is needed for the size of the vocabulary and cannot be read.
    """
    counts: Counter[tuple[str, str]] = Counter()
    trained: Counter[tuple[str, str]] = Counter()
    layers: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    with build_whole(recipe, recipe_vocab_size(recipe)) as model:
        for name, parameter in model.named_parameters():
            key = part_of(name), _module(name)
            counts[key] += parameter.numel()
            trained[key] += parameter.numel() * (name in recipe.training.trained)
            if found := _LAYER.search(name):
                layers[key].add(int(found[0]))
    table = Table("part", title="Modules")
    table.add_column("module", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("of them train", justify="right")
    for part, module in sorted(counts, key=lambda key: PARTS.index(key[0])):
        key = part, module
        if layers[key]:
            module = module.replace("layers.*", f"layers.{min(layers[key])}-{max(layers[key])}", 1)
        table.add_row(part, module, f"{counts[key]:,}", f"{trained[key]:,}")
    Console().print(table)


def _module(name: str) -> str:
    """The module of a parameter below its part: what is in a layer, for all layers together, else three words."""
    words = _LAYER.sub("*", name, count=1).split(".")[1:]
    depth = words.index("*") + 2 if "*" in words else 3
    return ".".join(words[: max(1, min(depth, len(words) - 1))])
