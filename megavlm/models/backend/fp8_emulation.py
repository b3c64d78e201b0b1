"""FP8 training without FP8 hardware: linear layers whose operands are rounded to FP8 and back.

It shows on any machine what FP8 does to the training of a model; it is slower than bfloat16, never faster. The layers
are megatron-core's own, with the three matrix products of each (output, gradient of the input, gradient of the weight)
done here. Exactly those products are emulated that Transformer Engine runs in FP8 under the same recipe: of attention's
and the feed-forward layer's linear layers, of experts, of cross-attention and of connectors made of such layers.
Embedding, output layer, norms, attention scores, routers and LoRA are not among them.

Shape letters: T vectors of a micro-batch, I input width, O output width of a tensor-parallel rank.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megavlm.models.backend.fp8_scaling import DelayedScaling, Fp8Rules, Quantizer, quantizers_of
from megavlm.models.backend.spec import Backend
from megavlm.models.backend.torch import TORCH


@dataclasses.dataclass(frozen=True)
class Operands:
    """What rounds the operands of one layer's products."""

    input: Quantizer
    weight: Quantizer
    grad: Quantizer

    @property
    def delayed(self) -> list[DelayedScaling]:
        """Those that have a history: all three or none."""
        return [each for each in (self.input, self.weight, self.grad) if isinstance(each, DelayedScaling)]


class _Product(torch.autograd.Function):
    """``input @ weight.T + bias`` and its gradients, with the operands that Transformer Engine's layers have.

    ``pytorch/module/linear.py``: the output is made of input and weight scaled along rows, the input's gradient of the
    output's gradient scaled along rows and the weight along columns, the weight's gradient of input and gradient scaled
    along columns; the bias' gradient is of the gradient as it came. Sums are float32, results in the operands' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, operands: Operands, keeps: tuple[bool, bool]
    ) -> Tensor:
        """``[..., I]``, ``[O, I]`` -> ``[..., O]``. ``keeps``: whether input and weight will need a gradient."""
        input_trains, weight_trains = keeps
        flat = states.reshape(-1, states.shape[-1]).float()
        rows, kept_input = operands.input.quantize(flat, rows=True, columns=weight_trains)
        weight_rows, kept_weight = operands.weight.quantize(weight.float(), rows=True, columns=input_trains)
        assert rows is not None
        assert weight_rows is not None
        output = rows @ weight_rows.T if bias is None else torch.addmm(bias.float(), rows, weight_rows.T)
        ctx.operands, ctx.dtypes = operands, (states.dtype, weight.dtype)
        ctx.save_for_backward(kept_input, kept_weight)
        return output.to(states.dtype).view(*states.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """``[..., O]`` -> gradients of input ``[..., I]``, weight ``[O, I]`` and bias ``[O]``."""
        (grad,) = grads
        kept_input, kept_weight = ctx.saved_tensors
        states_dtype, weight_dtype = ctx.dtypes
        flat = grad.reshape(-1, grad.shape[-1]).float()
        needs = {"rows": kept_weight is not None, "columns": kept_input is not None}
        rows, columns = ctx.operands.grad.quantize(flat, **needs) if any(needs.values()) else (None, None)
        input_grad = weight_grad = bias_grad = None
        if rows is not None:
            input_grad = (rows @ kept_weight).to(states_dtype).view(*grad.shape[:-1], kept_weight.shape[1])
        if columns is not None:
            weight_grad = (columns.T @ kept_input).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            bias_grad = flat.sum(0).to(weight_dtype)
        return input_grad, weight_grad, bias_grad, None, None


class Fp8Linear(torch.nn.Module):
    """What is common to the emulating layers. Goes before one of megatron-core's linear layers.

    With delayed scaling, the scales and their history are the layer's ``_extra_state`` in checkpoints, which other
    backends ignore.
    """

    rules: ClassVar[Fp8Rules]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.operands: Operands | None = Operands(*quantizers_of(self.rules))
        """None: it computes as if it did not emulate."""

    def switch_off(self) -> None:
        """Compute in the weights' own type from now on."""
        self.operands = None

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Called by megatron-core's layer for the product, and the communication around it that is not its own."""
        if self.operands is None:
            return super()._forward_impl(input=input, weight=weight, *args, **kwargs)  # type: ignore[misc] # noqa: B026
        if kwargs["sequence_parallel"]:
            input = tensor_parallel.gather_from_sequence_parallel_region(input, group=kwargs["tp_group"])
        elif kwargs["allreduce_dgrad"]:
            input = tensor_parallel.copy_to_tensor_model_parallel_region(input, group=kwargs["tp_group"])
        for scaling in self.operands.delayed:
            scaling.records = self.training
        is_recorded = torch.is_grad_enabled()
        keeps = (is_recorded and input.requires_grad, is_recorded and weight.requires_grad)
        return _Product.apply(input, weight, kwargs["bias"], self.operands, keeps)

    # ---- delayed scaling ---------------------------------------------------------------------------------------------

    def amaxes(self) -> Tensor:
        """Largest magnitudes of input, weight and gradient in this step, ``[3]``; ``[0]`` under other recipes."""
        delayed = [] if self.operands is None else self.operands.delayed
        return torch.stack([scaling.amax for scaling in delayed]) if delayed else torch.empty(0)

    def update_scales(self, amaxes: Tensor) -> None:
        """End a step. ``amaxes``: those of all ranks, ``[3]``."""
        assert self.operands is not None
        for scaling, amax in zip(self.operands.delayed, amaxes.unbind(), strict=True):
            scaling.update(amax)

    def get_extra_state(self) -> Tensor | None:
        """Scales and history of input, weight and gradient, ``[3, 1 + amax_history_len]``; None where none is kept."""
        delayed = [] if self.operands is None else self.operands.delayed
        return torch.stack([scaling.state() for scaling in delayed]) if delayed else None

    def set_extra_state(self, state: Any) -> None:
        """Take back what :meth:`get_extra_state` gave; begin anew with the state of a layer that had none."""
        if self.operands is None or not isinstance(state, Tensor):
            return
        for scaling, part in zip(self.operands.delayed, state.unbind(), strict=False):
            scaling.restore(part)


def emulating_backend(megatron_settings: Mapping[str, Any]) -> Backend:
    """The torch backend with linear layers that emulate FP8.

    Args:
        megatron_settings: TransformerConfig arguments, those of FP8 among them.
    """
    fields = {"rules": Fp8Rules.of(megatron_settings), "__doc__": Fp8Linear.__doc__}
    return dataclasses.replace(
        TORCH,
        column_parallel_linear=type("Fp8ColumnParallelLinear", (Fp8Linear, ColumnParallelLinear), fields),
        row_parallel_linear=type("Fp8RowParallelLinear", (Fp8Linear, RowParallelLinear), fields),
    )


def unemulated_settings(megatron_settings: Mapping[str, Any], *, has_experts: bool) -> dict[str, Any]:
    """The same TransformerConfig arguments without FP8, which is in the layers: megatron-core runs a bfloat16 model.

    Args:
        megatron_settings: TransformerConfig arguments.
        has_experts: experts are emulated; each has scales of its own, so they are computed one after another.
    """
    without = {**megatron_settings, "fp8": None, "first_last_layers_bf16": False}
    return {**without, "moe_grouped_gemm": False} if has_experts else without


def settle_emulation(
    parts: Mapping[str, torch.nn.Module], megatron_settings: Mapping[str, Any], bf16_parts: Collection[str]
) -> None:
    """See to what can only be seen when a model is built: that the parts can, and which layers at the ends do not.

    Args:
        parts: ``vision``, ``connector`` and ``language`` of this pipeline stage.
        megatron_settings: TransformerConfig arguments, those of FP8 among them.
        bf16_parts: parts that stay in bfloat16.

    Raises:
        ValueError: a part that shall be FP8 is made of other layers.
    """
    for name, part in parts.items():
        if name not in bf16_parts and not any(isinstance(module, Fp8Linear) for module in part.modules()):
            raise ValueError(
                f"engine.fp8.{name}='fp8': the layers of model.{name}, {type(part).__name__}, have no FP8 (of "
                "connectors mlp, linear and shared_mlp have). Set it to bf16."
            )
        for block in part.modules():
            if megatron_settings["first_last_layers_bf16"] and isinstance(block, TransformerBlock):
                _keep_ends(block, megatron_settings)


def _keep_ends(block: TransformerBlock, megatron_settings: Mapping[str, Any]) -> None:
    """Switch off the first and last layers of a stack (``is_first_last_bf16_layer`` of megatron-core)."""
    first = megatron_settings["num_layers_at_start_in_bf16"]
    last = block.config.num_layers - megatron_settings["num_layers_at_end_in_bf16"]
    for layer in block.layers:
        if not first < layer.layer_number <= last:
            for module in layer.modules():
                if isinstance(module, Fp8Linear):
                    module.switch_off()
