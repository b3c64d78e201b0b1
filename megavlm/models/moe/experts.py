"""All experts of a rank as one grouped matrix product.

Shape letters: L experts of this rank, E experts of the layer, T tokens that came to this rank, H hidden width, F width
inside an expert (of this expert-tensor-parallel rank).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

_ALIGNMENT_BYTES = 16


def can_group(config: TransformerConfig) -> bool:
    """Whether torch's grouped product takes the experts' shapes: rows must start at multiples of 16 bytes."""
    expert_tensor_parallel_size = config.expert_tensor_parallel_size or config.tensor_model_parallel_size
    widths = (config.hidden_size, config.moe_ffn_hidden_size // expert_tensor_parallel_size)
    return all(width * config.params_dtype.itemsize % _ALIGNMENT_BYTES == 0 for width in widths)


class GroupedExperts(MegatronModule):
    """Gated feed-forward experts (SwiGLU, no bias) through ``torch.nn.functional.grouped_mm``.

    It computes what megatron-core's ``SequentialMLP`` does, one product for all experts instead of one each, and its
    checkpoints have the same keys and shapes. It never communicates: the dispatcher sums over expert-tensor-parallel
    ranks.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        """Make the weights; they hold nothing yet.

        Args:
            num_local_experts: L.
            config: of the model.
            pg_collection: the expert-parallel groups.
        """
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        width = config.moe_ffn_hidden_size // self.tp_group.size()
        options = {"dtype": config.params_dtype, "device": "meta" if config.init_model_with_meta_device else None}
        shape = (num_local_experts, 2 * width, config.hidden_size)
        self.linear_fc1_weight = torch.nn.Parameter(torch.empty(shape, **options))
        """``[L, 2 F, H]``: gate, then value."""
        self.linear_fc2_weight = torch.nn.Parameter(
            torch.empty(num_local_experts, config.hidden_size, width, **options)
        )
        """``[L, H, F]``."""
        set_tensor_model_parallel_attributes(self.linear_fc1_weight, is_parallel=True, dim=1, stride=1)
        set_tensor_model_parallel_attributes(self.linear_fc2_weight, is_parallel=True, dim=2, stride=1)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """Run each expert on its tokens.

        Args:
            tokens: ``[T, H]``, sorted by expert.
            tokens_per_expert: ``[L]`` int64.
            weights: ``[T]``, of the router.

        Returns:
            ``[T, H]``, and no bias.
        """
        stops = tokens_per_expert.to(tokens.device).cumsum(0).to(torch.int32)
        gate, value = F.grouped_mm(tokens, self.linear_fc1_weight.transpose(1, 2), offs=stops).chunk(2, dim=-1)
        inner = (F.silu(gate) * value * weights.unsqueeze(-1)).to(tokens.dtype)
        output = F.grouped_mm(inner, self.linear_fc2_weight.transpose(1, 2), offs=stops)
        return _ContiguousGradient.apply(output), None

    def backward_dw(self) -> None:
        """Nothing is delayed."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Keys ``experts.linear_fc1.weight`` ``[E, 2 F, H]`` and ``experts.linear_fc2.weight`` ``[E, H, F]``."""
        assert not sharded_offsets, "layers have keys of their own"
        num_experts = self.num_local_experts * self.ep_group.size()
        first = self.num_local_experts * self.ep_group.rank()
        rank, size = self.tp_group.rank(), self.tp_group.size()
        replica_id = (0, 0, self.dp_group.rank())

        def gates_and_values(key: str, tensor: Tensor, replica_id: ReplicaId, _: slice | None) -> list[ShardedTensor]:
            # expert by expert: loading in parallel wants tensors that are contiguous
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    half,
                    (0, first + expert, num_experts),
                    (1, rank + number * size, 2 * size),
                    replica_id=replica_id,
                    prepend_axis_num=1,
                )
                for expert, weight in enumerate(tensor)
                for number, half in enumerate(weight.chunk(2))
            ]

        return {
            f"{prefix}linear_fc1_weight": ShardedTensorFactory(
                f"{prefix}experts.linear_fc1.weight",
                self.linear_fc1_weight,
                gates_and_values,
                lambda halves: torch.cat(halves).view_as(self.linear_fc1_weight),
                replica_id,
            ),
            f"{prefix}linear_fc2_weight": ShardedTensor.from_rank_offsets(
                f"{prefix}experts.linear_fc2.weight",
                self.linear_fc2_weight,
                (0, self.ep_group.rank(), self.ep_group.size()),
                (2, rank, size),
                replica_id=replica_id,
            ),
        }


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous: the grouped product refuses strides of 0, as a sum's gradient has."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()
