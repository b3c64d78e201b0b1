"""What ``megavlm plan`` prints."""

from rich.console import Console
from rich.table import Table

from megavlm.planning.experts import count_experts
from megavlm.planning.flops import count_flops
from megavlm.planning.memory import RankMemory, count_memory
from megavlm.planning.parameters import count_recipe_parameters, recipe_vocab_size
from megavlm.planning.row import full_row
from megavlm.recipe import Recipe

_GIB = 2**30


def print_plan(recipe: Recipe, world_size: int | None = None) -> None:
    """Print parameters of each part, what training a full row costs, and what a rank holds.

    Args:
        recipe: of the run.
        world_size: ranks of the run; None: memory is left out.

    Raises:
        ValueError: the tokenizer is needed for the size of the vocabulary and cannot be read, or the layout does not
            fit the ranks.
    """
    vocab_size = recipe_vocab_size(recipe)
    tables = [_model_table(recipe, vocab_size)]
    if world_size is not None:
        tables.append(_memory_table(recipe, world_size, count_memory(recipe, world_size, vocab_size)))
    for table in tables:
        Console().print(table)


def _model_table(recipe: Recipe, vocab_size: int) -> Table:
    parameters = count_recipe_parameters(recipe, vocab_size)
    experts = count_experts(recipe.model.language)
    row = full_row(recipe)
    trained = recipe.training.trained
    flops = count_flops(recipe.model, row, vocab_size=vocab_size, trainable=trained)
    has_experts = experts.experts > 0
    table = Table("part", "parameters", title="Model")
    if has_experts:
        table.add_column("active")
    table.add_column("trains")
    table.add_column("FLOPs of a full row")

    def add(name: str, count: int, idle: int, state: str, operations: int, *, style: str | None = None) -> None:
        active = [f"{count - idle:,}"] if has_experts else []
        table.add_row(name, f"{count:,}", *active, state, f"{operations:.3e}", style=style)

    for part, count in parameters.items():
        state = "no" if part not in trained.parts else "yes" if trained.is_whole(part) else "in part"
        add(part, count, experts.idle if part == "language" else 0, state, flops.per_part[part])
        if part == "language" and has_experts:
            add("  of it experts", experts.experts, experts.idle, state, flops.inside["experts"], style="dim")
            add("  of it routers", experts.router, 0, state, flops.inside["router"], style="dim")
    add("all", parameters.total(), experts.idle, "", flops.total, style="bold")
    context = f" and {row.context_length} of context" if row.context_length else ""
    table.caption = (
        f"A full row: {row.tokens.shape[1]} tokens{context}, {row.tiles.shape[0]} tiles. Forward and backward."
    )
    if has_experts:
        table.caption += " Active: what one token meets."
    return table


def _memory_table(recipe: Recipe, world_size: int, ranks: list[RankMemory]) -> Table:
    engine = recipe.engine
    tp, pp = engine.tensor_model_parallel_size, engine.pipeline_model_parallel_size
    layout = f"tp {tp}, pp {pp}, dp {world_size // (tp * pp)}"
    has_experts = recipe.model.language.moe is not None
    if has_experts:
        ep, etp = engine.expert_model_parallel_size, engine.expert_tensor_parallel_size or tp
        layout += f"; experts: ep {ep}, etp {etp}, dp {world_size // (ep * etp * pp)}"
    table = Table("pipeline stage", "weights", "gradients", "optimizer", "all", title="GiB of a rank")
    if has_experts:
        table.add_column("of it experts")
    for rank in ranks:
        amounts = [rank.weights, rank.gradients, rank.optimizer, rank.total, *([rank.experts] if has_experts else [])]
        table.add_row(str(rank.pipeline_rank), *(f"{amount / _GIB:,.2f}" for amount in amounts))
    table.caption = f"{world_size} ranks: {layout}. Activations and buffers of communication come on top."
    return table
