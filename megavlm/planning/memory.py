"""Counts the memory that weights, gradients and optimizer take on a rank, by building what the rank would build.

Activations and buffers of communication are not counted: they depend on the kernels. Neither are the weights that
ZeRO's third stage gathers while it uses them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megavlm.build import check_run
from megavlm.engines import DeepSpeedEngineConfig, MegatronEngine
from megavlm.models.part import parameters_by_name
from megavlm.models.vlm import VLM
from megavlm.recipe import Recipe
from megavlm.runtime.fake_world import fake_world

_FLOAT32_BYTES = 4
_Amounts = tuple[float, float, float]


@dataclass(frozen=True)
class RankMemory:
    """What a rank of one pipeline stage holds, in bytes; all ranks of a stage hold the same, but for padding."""

    pipeline_rank: int
    weights: float
    """In the run's precision."""
    gradients: float
    """float32, of the weights that train."""
    optimizer: float
    """Adam's two moments, and beside bfloat16 weights their float32 masters: of a share of the trained weights with the
    distributed optimizer. Copies of an expert lie on fewer ranks than copies of other weights."""
    experts: float
    """The part of the three above that experts take."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def count_memory(recipe: Recipe, world_size: int, vocab_size: int) -> list[RankMemory]:
    """Return what a rank of each pipeline stage holds, first stage first. Nothing is allocated.

    Args:
        recipe: its layout, its model and what trains.
        world_size: ranks of the run.
        vocab_size: see :func:`megavlm.planning.parameters.recipe_vocab_size`.

    Raises:
        ValueError: the layout does not fit the model, the ranks or the batch.
    """
    check_run(recipe, world_size)
    num_stages = recipe.engine.pipeline_model_parallel_size
    return [
        _count_rank(recipe, world_size, stage * (world_size // num_stages), vocab_size) for stage in range(num_stages)
    ]


def _count_rank(recipe: Recipe, world_size: int, rank: int, vocab_size: int) -> RankMemory:
    weights = gradients = optimizer = experts = 0.0
    with fake_world(world_size, rank):
        engine = MegatronEngine(recipe.engine.on_any_machine())
        engine.start()
        item_bytes = recipe.engine.dtype.itemsize
        per_trained = (2 if recipe.engine.precision == "fp32" else 3) * _FLOAT32_BYTES
        zero = recipe.engine if isinstance(recipe.engine, DeepSpeedEngineConfig) else None
        if zero is not None:
            per_trained = 3 * _FLOAT32_BYTES  # ZeRO has a copy of its own also where weights are float32
        for name, parameter in _parameters(recipe, engine, vocab_size):
            is_expert = ".mlp.experts." in name
            trained = parameter.numel() * (name in recipe.training.trained)
            is_shared = zero is None and recipe.engine.use_distributed_optimizer
            copies = _num_copies(is_expert) if is_shared else 1
            own: _Amounts = (parameter.numel() * item_bytes, trained * _FLOAT32_BYTES, trained * per_trained / copies)
            if zero is not None:
                own = _share(own, zero, parallel_state.get_data_parallel_world_size())
            weights, gradients, optimizer = weights + own[0], gradients + own[1], optimizer + own[2]
            experts += sum(own) * is_expert
        return RankMemory(parallel_state.get_pipeline_model_parallel_rank(), weights, gradients, optimizer, experts)


def _share(
    whole: tuple[float, float, float], zero: DeepSpeedEngineConfig, num_ranks: int
) -> tuple[float, float, float]:
    """What ZeRO leaves of a weight, its gradient and its (shared) optimizer state on the device of one rank.

    ZeRO (arXiv 1910.02054): stage 1 shares the optimizer's state, 2 also gradients, 3 also weights. What is offloaded
    is not on the device.
    """
    weight, gradient, optimizer = whole
    if zero.zero_stage == 3:
        weight = 0.0 if zero.offload_param else weight / num_ranks
    if zero.zero_stage >= 2:
        gradient /= num_ranks
    optimizer = 0.0 if zero.offload_optimizer else optimizer / num_ranks
    return weight, gradient, optimizer


def _parameters(recipe: Recipe, engine: MegatronEngine, vocab_size: int) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for stage in engine.stages():
        chunk = VLM(
            recipe.model,
            engine.config.megatron_settings(),
            vocab_size=vocab_size,
            image_token_id=vocab_size - 1,
            pre_process=stage.pre_process,
            post_process=stage.post_process,
            vp_stage=stage.vp_stage,
        )
        yield from parameters_by_name(chunk)


def _num_copies(is_expert: bool) -> int:
    """Ranks that hold the same weight, over which the distributed optimizer shares its state."""
    if is_expert:
        return parallel_state.get_expert_data_parallel_world_size()
    return parallel_state.get_data_parallel_world_size()
