"""Guards against what megatron-core 0.16.1 gets wrong without a word.

Each guard names its trap: where megatron-core has it and what it does to a run. ``tests/parallel/test_traps.py`` shows
each of them with and without its guard, so it tells when megatron-core mends one. Three traps have their guard
elsewhere: exits without teardown in :func:`megavlm.runtime.process.stop`, the causal mask of megatron-core's local ViT
layer spec in the spec that ``models/vision`` writes itself, and flipped bits of checkpoints in the checkpoint manifest.

An engine calls, in this order: :func:`megavlm.runtime.layout.check_parallel_config` on the recipe's numbers,
:func:`install_optimizer` and :func:`supply_missing_names` once, :func:`settle_config` on the TransformerConfig,
:func:`before_wrap` on the model chunks, :func:`own_metrics` in its forward step, :func:`check_optimizer_state` before
it loads one. :data:`CHECKPOINT_ERRORS` is what reading a checkpoint can raise.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import megatron.core.optimizer
import megatron.core.optimizer.distrib_optimizer
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.distributed import DistributedDataParallel
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.checkpoint import CheckpointException

from megavlm.engines.fused_adam import FusedAdam
from megavlm.runtime import megatron_patches
from megavlm.runtime.log import LOGGER

CHECKPOINT_ERRORS: tuple[type[BaseException], ...] = (
    CheckpointException,
    CheckpointingException,
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    ValueError,
)
"""What reading or writing a checkpoint of megatron-core can raise, for ``except CHECKPOINT_ERRORS``.

``torch.distributed.checkpoint.CheckpointException`` has to be named: it is a BaseException, so ``except Exception``
lets it pass (trap T10).
"""


def settle_config(config: TransformerConfig) -> None:
    """Settle the fields of a TransformerConfig that decide whether a layout computes the right thing. Changes it.

    T1, ``p2p_communication._batched_p2p_ops``: with two pipeline stages the next rank is the previous rank, and the
    batched sends of the interleaved schedule are paired with the wrong receives. The loss stays where it began and
    the gradient norm is off by 1000 times. ``batch_p2p_comm`` is switched off.

    T9, ``fusions/fused_cross_entropy.calculate_gradients``: the gradients of the logits are rounded to bfloat16,
    whatever the run's precision.

    Raises:
        ValueError: the fused cross entropy of megatron-core is asked for in a float32 run.
    """
    interleaved = (config.virtual_pipeline_model_parallel_size or 1) > 1
    if interleaved and config.pipeline_model_parallel_size == 2 and config.batch_p2p_comm:
        config.batch_p2p_comm = False
        LOGGER.info("batch_p2p_comm=False: two interleaved pipeline stages cannot use batched sends")
    fused_loss = config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "native"
    if fused_loss and config.params_dtype == torch.float32:
        raise ValueError(
            "cross_entropy_loss_fusion=True: cross_entropy_fusion_impl='native' rounds the gradients of the logits to"
            " bfloat16, and this run computes in float32. Set cross_entropy_loss_fusion=false."
        )


def install_optimizer() -> None:
    """Make megatron-core use :class:`FusedAdam` where neither Transformer Engine nor Apex is installed. Idempotent.

    T3, ``distrib_optimizer.DistributedOptimizer.load_state_dict``: with torch's AdamW the parameters of a resumed run
    share one step tensor, which every one of them counts up: 59 instead of 5 after one step of a small model.
    """
    optimizer, distributed = megatron.core.optimizer, megatron.core.optimizer.distrib_optimizer
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False  # else AdamW is chosen by name
    distributed.Adam = FusedAdam
    distributed.HAVE_APEX_OR_TE = True  # the step is in the parameter group
    distributed.USING_APEX_OPTIMIZER = True


def supply_missing_names() -> None:
    """Supply what megatron-core's modules take for granted where Transformer Engine is not installed. Idempotent.

    Not silent, but in the way of every GPU without it: a NameError in the MoE router and in selective recompute.
    """
    if not HAVE_TE:
        megatron_patches.define_te_gemm(moe_utils)
        megatron_patches.default_to_no_fp8(tensor_parallel.random)


def before_wrap(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Mark parameters as what they are, before DistributedDataParallel and the optimizer sort them by those marks."""
    mark_sharded_weights(model_chunks)
    mark_experts(model_chunks)
    copy_recomputed_biases(model_chunks)


def mark_sharded_weights(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Mark the weights of tensor-parallel layers as different on each tensor-parallel rank.

    ``tensor_parallel/layers.py``: with ``perform_initialization=False`` the layers skip the marks along with the random
    values. The gradient norm then counts the shard of tensor-parallel rank 0 alone: it is too small (0.87 instead of
    1.03 for a small model at tp 2), so clipping and the log are wrong.
    """
    split_dimensions = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for chunk in model_chunks:
        for module in chunk.modules():
            dimension = next((axis for layer, axis in split_dimensions.items() if isinstance(module, layer)), None)
            weight = getattr(module, "weight", None)
            if dimension is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dimension, stride=1)


def mark_experts(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Mark every parameter of an expert as such.

    T2, ``tensor_parallel/layers.py`` (``allreduce = not (is_expert and expert_model_parallel_size > 1)``): without
    expert parallelism, but tensor parallelism outside the experts, the tensor-parallel ranks hold copies of the same
    experts and see different tokens. Their gradients are not summed: the copies drift apart, and a checkpoint saves
    one of them. The mark also gives checkpoints of every expert layout the same optimizers.
    """
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, BaseMoELayer):
                for param in module.experts.parameters():
                    param.allreduce = False


def copy_recomputed_biases(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Let feed-forward layers that are recomputed give out a copy of their second bias.

    ``transformer/mlp.py`` returns the bias itself beside the output, for a fused residual, and what
    ``tensor_parallel.checkpoint`` returns becomes a part of the graph: the weight then has its own recomputation as
    its origin, and the backward pass goes round for ever.
    """
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, MLP) and "mlp" in (module.config.recompute_modules or ()):
                module.register_forward_hook(_copy_bias)


def _copy_bias(module: torch.nn.Module, inputs: Any, outputs: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    """Hook of an MLP."""
    output, bias = outputs
    return output, None if bias is None else bias.clone()


def skip_lone_collectives(wrapped_chunks: Sequence[DistributedDataParallel]) -> None:
    """Do without the reduction of gradients and the gathering of weights where there is one data-parallel rank.

    Not an error, but not free either: over one rank they are the identity, and gloo still copies all gradients and all
    weights for it (7 % of a bfloat16 step on a CPU). With overlap it is left: its bookkeeping waits for them.
    """
    for chunk in wrapped_chunks:
        overlaps = chunk.ddp_config.overlap_grad_reduce or chunk.ddp_config.overlap_param_gather
        for buffers, groups in (
            (chunk.buffers, chunk.bucket_groups),
            (chunk.expert_parallel_buffers, chunk.expert_parallel_bucket_groups),
        ):
            if overlaps or any(buffer.data_parallel_group.size() > 1 for buffer in buffers):
                continue
            for group in groups:
                group.start_grad_sync = _nothing
                group.start_param_sync = _nothing


def _nothing(**_: Any) -> None:
    """Stands for a collective over one rank."""


def own_metrics(metrics: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy what a loss function reports, so that it keeps its value.

    T6, ``pipeline_parallel/schedules.forward_step_calc_loss``: the loss is divided in place by the number of
    micro-batches (and tokens) after the loss function returned it, and with it everything that shares its memory, as
    ``loss.detach()`` does.
    """
    return {name: value.detach().clone() for name, value in metrics.items()}


def check_optimizer_state(state_dict: Mapping[Any, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Refuse a distributed optimizer's state that lacks the moments.

    T4, ``DistributedOptimizer.load_state_dict``: a checkpoint that was loaded without its optimizer tensors still
    brings the optimizer's common part; loading that allocates the moments with ``torch.empty`` and fills them with
    nothing. The run gives NaN, or worse, does not.

    Args:
        state_dict: what would be given to the optimizer's ``load_state_dict``: of one DistributedOptimizer, or a list
            or numbered dict of those.

    Raises:
        ValueError: a state has no ``param_state``.
    """
    is_single = isinstance(state_dict, Mapping) and "optimizer" in state_dict
    states = [state_dict] if is_single else state_dict.values() if isinstance(state_dict, Mapping) else state_dict
    states = list(states)
    without = [index for index, state in enumerate(states) if "param_state" not in state]
    if without or not states:
        raise ValueError(
            f"optimizer: {len(without)} of {len(states)} optimizer states hold no param_state (the moments). Load the"
            " checkpoint with its optimizer, or start with a fresh one."
        )
