"""What ``megavlm plan`` prints."""

from rich.console import Console
from rich.table import Table

from megavlm.planning.flops import count_flops
from megavlm.planning.parameters import count_recipe_parameters, recipe_vocab_size
from megavlm.planning.row import full_row
from megavlm.recipe import Recipe


def print_plan(recipe: Recipe) -> None:
    """Print parameters of each part, and what training a full row costs.

    Raises:
        ValueError: the tokenizer is needed for the size of the vocabulary and cannot be read.
    """
    vocab_size = recipe_vocab_size(recipe)
    parameters = count_recipe_parameters(recipe, vocab_size)
    row = full_row(recipe)
    trainable = recipe.training.trainable
    flops = count_flops(recipe.model, row, vocab_size=vocab_size, trainable=trainable)
    context = f" and {row.context_length} of context" if row.context_length else ""
    table = Table("part", "parameters", "trains", "FLOPs of a full row", title="Model")
    for part, count in parameters.items():
        state = "yes" if part in trainable else "no"
        table.add_row(part, f"{count:,}", state, f"{flops.per_part[part]:.3e}")
    table.add_row("all", f"{parameters.total():,}", "", f"{flops.total:.3e}", style="bold")
    table.caption = (
        f"A full row: {row.tokens.shape[1]} tokens{context}, {row.tiles.shape[0]} tiles. Forward and backward."
    )
    Console().print(table)
