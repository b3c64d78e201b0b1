"""Checks that a layout fits the model, the machine and the batch, on plain numbers and before anything is built.

megatron-core would notice most of it, but one thing at a time, deep in a constructor, and in its own words. Imports
nothing of the project and no megatron.core.
"""

import math
from dataclasses import dataclass
from typing import Protocol


class ParallelSizes(Protocol):
    """The layout. Recipes and TransformerConfig both have these fields, in megatron-core's spelling."""

    @property
    def tensor_model_parallel_size(self) -> int: ...
    @property
    def pipeline_model_parallel_size(self) -> int: ...
    @property
    def virtual_pipeline_model_parallel_size(self) -> int | None: ...
    @property
    def context_parallel_size(self) -> int: ...
    @property
    def expert_model_parallel_size(self) -> int: ...
    @property
    def expert_tensor_parallel_size(self) -> int | None: ...
    @property
    def sequence_parallel(self) -> bool: ...


class ModelSizes(Protocol):
    """What the layout has to divide. TransformerConfig has these fields."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int | None: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_query_groups(self) -> int | None: ...
    @property
    def num_moe_experts(self) -> int | None: ...


@dataclass(frozen=True)
class NothingSplit:
    """Sizes of a language model that is whole on every rank: every layout divides them."""

    num_layers: int = 0
    hidden_size: int = 0
    ffn_hidden_size: int = 0
    num_attention_heads: int = 0
    num_query_groups: int | None = None
    num_moe_experts: int | None = None


def check_parallel_config(
    parallel: ParallelSizes,
    model: ModelSizes,
    *,
    world_size: int,
    micro_batch_size: int,
    global_batch_size: int,
    seq_length: int,
    padded_vocab_size: int,
) -> None:
    """Check that the layout fits the model, the machine and the batch, before anything is built.

    Args:
        parallel: the layout.
        model: the language model.
        world_size: number of processes.
        micro_batch_size, global_batch_size: in samples.
        seq_length: tokens that enter the decoder per sample, image tokens included.
        padded_vocab_size: rows of the embedding, padding included.

    Raises:
        ValueError: one line for each thing that does not fit, with both numbers and the legal values.
    """
    problems = [
        *_world_problems(parallel, world_size),
        *_tensor_problems(parallel, model, seq_length, padded_vocab_size),
        *_pipeline_problems(parallel, model),
        *_expert_problems(parallel, model, world_size),
    ]
    if not problems:  # the batch is counted in data-parallel ranks, which a wrong layout does not have
        problems = _batch_problems(parallel, world_size, micro_batch_size, global_batch_size)
    if problems:
        raise ValueError("\n".join(problems))


def _divisors(*numbers: int) -> str:
    common = math.gcd(*numbers)
    return ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)


def _world_problems(parallel: ParallelSizes, world_size: int) -> list[str]:
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    named = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": cp}
    problems = [
        f"{name}={size}: must be at least 1. Use 1 to switch it off." for name, size in named.items() if size < 1
    ]
    if not problems and world_size % (tp * pp * cp):
        product = "tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size"
        problems.append(
            f"world_size={world_size}: is no multiple of {product} = {tp} * {pp} * {cp} = {tp * pp * cp}."
            f" Start a multiple of {tp * pp * cp} processes, or choose sizes whose product is one of"
            f" {_divisors(world_size)}."
        )
    return problems


def _tensor_problems(parallel: ParallelSizes, model: ModelSizes, seq_length: int, padded_vocab_size: int) -> list[str]:
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if tp < 1 or cp < 1:
        return []
    divided = {
        "num_attention_heads": model.num_attention_heads,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size or 4 * model.hidden_size,
    }
    problems = [
        f"tensor_model_parallel_size={tp}: does not divide {name}={size}. Use one of {_divisors(*divided.values())}."
        for name, size in divided.items()
        if size % tp
    ]
    groups = model.num_query_groups or model.num_attention_heads
    if groups % tp and tp % groups:
        problems.append(
            f"tensor_model_parallel_size={tp}: is neither a divisor nor a multiple of num_query_groups={groups}."
            f" Use one of {_divisors(groups)}."
        )
    if padded_vocab_size % tp:
        problems.append(
            f"padded_vocab_size={padded_vocab_size}: is no multiple of tensor_model_parallel_size={tp}. Pad the"
            f" vocabulary to {-(-padded_vocab_size // tp) * tp}."
        )
    if parallel.sequence_parallel and tp == 1:
        problems.append(
            "sequence_parallel=True: splits along tensor_model_parallel_size=1. Set sequence_parallel=false or"
            " tensor_model_parallel_size to 2 or more."
        )
    pieces = (tp if parallel.sequence_parallel else 1) * (2 * cp if cp > 1 else 1)
    if seq_length % pieces:
        problems.append(
            f"seq_length={seq_length}: is no multiple of {pieces}, which sequence_parallel="
            f"{parallel.sequence_parallel} with tensor_model_parallel_size={tp} and context_parallel_size={cp} need."
            f" Use {-(-seq_length // pieces) * pieces}."
        )
    return problems


def _pipeline_problems(parallel: ParallelSizes, model: ModelSizes) -> list[str]:
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if pp < 1:
        return []
    if vpp is not None and vpp < 1:
        return [f"virtual_pipeline_model_parallel_size={vpp}: must be at least 1, or null to switch it off. Use null."]
    problems = []
    if vpp is not None and vpp > 1 and pp == 1:
        problems.append(
            f"virtual_pipeline_model_parallel_size={vpp}: needs pipeline stages to interleave, and"
            " pipeline_model_parallel_size=1. Set it to null or pipeline_model_parallel_size to 2 or more."
        )
    stages = pp * (vpp or 1)
    if model.num_layers % stages:
        problems.append(
            f"num_layers={model.num_layers}: is no multiple of pipeline_model_parallel_size *"
            f" virtual_pipeline_model_parallel_size = {pp} * {vpp or 1} = {stages}. Choose sizes whose product is"
            f" one of {_divisors(model.num_layers)}."
        )
    return problems


def _expert_problems(parallel: ParallelSizes, model: ModelSizes, world_size: int) -> list[str]:
    tp, pp, ep = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
    )
    etp = parallel.expert_tensor_parallel_size or tp
    if model.num_moe_experts is None:
        if ep == 1:
            return []
        return [
            f"expert_model_parallel_size={ep}: the language model has no experts (num_moe_experts=null). Set it to 1."
        ]
    problems = []
    if model.num_moe_experts % ep:
        problems.append(
            f"expert_model_parallel_size={ep}: does not divide num_moe_experts={model.num_moe_experts}. Use one of"
            f" {_divisors(model.num_moe_experts)}."
        )
    if pp >= 1 and world_size % (etp * ep * pp):
        problems.append(
            f"world_size={world_size}: is no multiple of expert_tensor_parallel_size * expert_model_parallel_size *"
            f" pipeline_model_parallel_size = {etp} * {ep} * {pp} = {etp * ep * pp}. Choose sizes whose product is"
            f" one of {_divisors(world_size)}."
        )
    if tp > 1 and not parallel.sequence_parallel:
        problems.append(
            f"sequence_parallel=False: experts with tensor_model_parallel_size={tp} need it. Set it to true."
        )
    return problems


def _batch_problems(
    parallel: ParallelSizes, world_size: int, micro_batch_size: int, global_batch_size: int
) -> list[str]:
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    dp = world_size // (parallel.tensor_model_parallel_size * pp * parallel.context_parallel_size)
    samples = micro_batch_size * dp
    if micro_batch_size < 1 or global_batch_size < 1:
        return [
            f"micro_batch_size={micro_batch_size}, global_batch_size={global_batch_size}: must be at least 1. Raise the"
            " smaller one."
        ]
    if global_batch_size % samples:
        below, above = global_batch_size // samples * samples, -(-global_batch_size // samples) * samples
        return [
            f"global_batch_size={global_batch_size}: is no multiple of micro_batch_size * data-parallel size ="
            f" {micro_batch_size} * {dp} = {samples}. Use {f'{below} or ' if below else ''}{above}."
        ]
    num_microbatches = global_batch_size // samples
    if (vpp or 1) > 1 and num_microbatches % pp:
        above = -(-num_microbatches // pp) * pp * samples
        return [
            f"global_batch_size={global_batch_size}: makes {num_microbatches} micro-batches, and the interleaved"
            f" schedule needs a multiple of pipeline_model_parallel_size={pp}. Use {above}."
        ]
    return []
