"""Low-rank adaptation of the decoder (LoRA, arXiv 2106.09685): frozen matrices with a trained product beside them.

What is added to a projection is ``lora_alpha / r * B A x``, as in ``peft``, whose names the settings have.
megatron-core keeps several projections in one matrix; each has its own A and B here, so that adapters go out and in
unchanged. On tensor-parallel ranks B is split as the rows of a column-parallel matrix are, A as the columns of a
row-parallel one; the other of the two is whole on each rank. Shape letters: S tokens, N rows, I and O width in and out
(of this rank).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megavlm.models.backend import Backend
from megavlm.models.lora.config import FEED_FORWARD_PROJECTIONS, PROJECTIONS, LoraConfig
from megavlm.models.weights import start_at
from megavlm.runtime import current_device


def with_lora(layer: ModuleSpec, lora: LoraConfig, number: int) -> ModuleSpec:
    """Return the spec of a decoder layer with LoRA in the projections that are asked for.

    Args:
        layer: of :func:`megavlm.models.backend.layer_spec`, whose norms stand alone (see :func:`unfused`).
        lora: the settings.
        number: of the layer, counted from 0.
    """
    submodules = layer.submodules
    attention, mlp = submodules.self_attention, submodules.mlp
    attention = _adapted(attention, ("linear_qkv", "linear_proj"), lora, number)
    if any(lora.adapts(number, name) for name in FEED_FORWARD_PROJECTIONS):
        mlp = _adapted(mlp, ("linear_fc1", "linear_fc2"), lora, number)
    return dataclasses.replace(layer, submodules=dataclasses.replace(submodules, self_attention=attention, mlp=mlp))


def unfused(backend: Backend) -> Backend:
    """The same with norms that stand alone: LoRA reads what comes out of them."""
    return dataclasses.replace(backend, norm_column_parallel_linear=None)


def _adapted(spec: ModuleSpec, layers: Sequence[str], lora: LoraConfig, number: int) -> ModuleSpec:
    changed = {}
    for layer in layers:
        targets = tuple(name for name in PROJECTIONS[layer] if lora.adapts(number, name))
        if targets:
            base = getattr(spec.submodules, layer)
            changed[layer] = _lora_class(base, lora, layer, targets)
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, **changed))


def _lora_class(
    base: type[torch.nn.Module], lora: LoraConfig, layer: str, targets: Sequence[str]
) -> type["LoraLinear"]:
    """A backend's linear layer with LoRA beside it: a class, because megatron-core asks for one, with its settings."""
    fields = {"lora_config": lora, "layer": layer, "targets": targets, "__doc__": LoraLinear.__doc__}
    return type(f"Lora{base.__name__}", (LoraLinear, base), fields)


@dataclass(frozen=True)
class FusedRows:
    """How a rank's rows of megatron-core's matrix are shared by projections: group by group, a share of each."""

    num_groups: int
    shares: dict[str, int]
    """Projection -> rows of a group."""

    @classmethod
    def of(cls, layer: str, config: TransformerConfig, num_rows: int) -> "FusedRows":
        """Of a layer with that many rows on a rank.

        Raises:
            ValueError: tensor-parallel ranks share key/value groups.
        """
        tp = config.tensor_model_parallel_size
        if layer != "linear_qkv":
            names = PROJECTIONS[layer]
            return cls(1, dict.fromkeys(names, num_rows // len(names)))
        if config.num_query_groups % tp:
            raise ValueError(
                f"model.language.lora: num_query_groups={config.num_query_groups} is not a multiple of "
                f"tensor_model_parallel_size={tp}, and LoRA needs whole groups on a rank. Change one of them."
            )
        num_heads, channels = config.num_attention_heads // config.num_query_groups, config.kv_channels
        return cls(
            config.num_query_groups // tp, {"q_proj": num_heads * channels, "k_proj": channels, "v_proj": channels}
        )

    def rows_of(self, projection: str) -> int:
        """Rows of a projection on this rank."""
        return self.num_groups * self.shares[projection]

    def fuse(self, projected: dict[str, Tensor]) -> Tensor:
        """Put ``[..., rows of a projection]`` where the matrix has them: ``[..., rows]``, zeros where nothing is."""
        if len(self.shares) == 1:
            return next(iter(projected.values()))
        some = next(iter(projected.values()))
        groups = [
            projected[name].unflatten(-1, (self.num_groups, share))
            if name in projected
            else some.new_zeros(*some.shape[:-1], self.num_groups, share)
            for name, share in self.shares.items()
        ]
        return torch.cat(groups, dim=-1).flatten(-2)


class LoraLinear(torch.nn.Module):
    """A tensor-parallel linear layer with LoRA beside it; its own weights keep their checkpoint keys."""

    lora_config: ClassVar[LoraConfig]
    layer: ClassVar[str]
    """A key of :data:`PROJECTIONS`."""
    targets: ClassVar[Sequence[str]]
    """Projections of the layer that are adapted."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)  # type: ignore[call-arg]
        self.lora = Lora(config, self.lora_config, self.layer, self.targets, input_size, output_size)

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the linear layer: output and the bias that it leaves to its caller."""
        output, bias = super().forward(states, *args, **kwargs)
        return output + self.lora(states), bias

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the linear layer's sharded tensors, and LoRA's under ``lora.``."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        inside = f"{prefix}lora."
        own = {key: value for key, value in own.items() if not key.startswith(inside)}
        return own | self.lora.sharded_state_dict(inside, sharded_offsets, metadata)

    @torch.no_grad()
    def merge(self) -> None:
        """Add LoRA to the weight, in place, and set B to zero: the same function, to rounding."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        weight.copy_(weight.float() + self.lora.added_weight())
        for pair in self.lora.pairs():
            pair.b.zero_()


class LoraPair(torch.nn.Module):
    """A and B of one projection."""

    def __init__(self, config: TransformerConfig, rank: int, input_size: int, output_size: int) -> None:
        super().__init__()

        def empty(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=current_device()))

        self.a = empty(rank, input_size)
        self.b = start_at(empty(output_size, rank), 0.0)


class Lora(torch.nn.Module):
    """What is added to the output of one of megatron-core's linear layers."""

    def __init__(
        self,
        config: TransformerConfig,
        lora: LoraConfig,
        layer: str,
        targets: Sequence[str],
        input_size: int,
        output_size: int,
    ) -> None:
        """Make the pairs.

        Args:
            config: of the decoder.
            lora: the settings.
            layer: a key of :data:`PROJECTIONS`.
            targets: projections of the layer that are adapted.
            input_size, output_size: of the whole layer, over all ranks and projections.

        Raises:
            ValueError: tensor-parallel ranks share key/value groups.
        """
        super().__init__()
        tp = config.tensor_model_parallel_size
        self.targets = tuple(targets)
        self.scale, self.dropout = lora.scale, lora.lora_dropout
        self.is_column_parallel = layer in ("linear_qkv", "linear_fc1")
        self.is_split_over_sequence = config.sequence_parallel and tp > 1
        if self.is_column_parallel:
            output_size //= tp
        else:
            input_size //= tp
        self.rows = FusedRows.of(layer, config, output_size)
        for name in self.targets:
            pair = LoraPair(config, lora.r, input_size, self.rows.rows_of(name))
            split, whole = (pair.b, pair.a) if self.is_column_parallel else (pair.a, pair.b)
            set_tensor_model_parallel_attributes(split, is_parallel=True, dim=self._split_axis, stride=1)
            # each rank sees only its share of the tokens by this one
            whole.sequence_parallel = self.is_split_over_sequence  # type: ignore[attr-defined]
            self.add_module(name, pair)

    @property
    def _split_axis(self) -> int:
        return 0 if self.is_column_parallel else 1

    def pairs(self) -> list[LoraPair]:
        """A and B of each adapted projection."""
        return [getattr(self, name) for name in self.targets]

    def forward(self, states: Tensor) -> Tensor:
        """``[S, N, I]`` -> what is added to the layer's ``[S, N, O]``, split and reduced as the layer's own output."""
        projected = {}
        for name, pair in zip(self.targets, self.pairs(), strict=True):
            inner = self._between_ranks(F.linear(self._drop(states), pair.a))
            projected[name] = F.linear(inner, pair.b) * self.scale
        return self.rows.fuse(projected)

    def _drop(self, states: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return states
        if self.is_column_parallel and not self.is_split_over_sequence:
            return F.dropout(states, self.dropout)  # whole on every rank, and so is the mask
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return F.dropout(states, self.dropout)

    def _between_ranks(self, inner: Tensor) -> Tensor:
        """``A x`` as B needs it: of all tokens for split rows; added up over split columns."""
        if self.is_column_parallel:
            if self.is_split_over_sequence:
                return tensor_parallel.gather_from_sequence_parallel_region(inner)
            return tensor_parallel.copy_to_tensor_model_parallel_region(inner)
        if self.is_split_over_sequence:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(inner)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(inner)

    def added_weight(self) -> Tensor:
        """What the layer's weight would have to be larger by, ``[O, I]`` float32: this rank's part of it."""
        projected = {
            name: (pair.b.float() @ pair.a.float() * self.scale).T
            for name, pair in zip(self.targets, self.pairs(), strict=True)
        }
        return self.rows.fuse(projected).T

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return A and B of each projection, one of them split over tensor-parallel ranks."""
        assert metadata is not None
        leaf = "b" if self.is_column_parallel else "a"
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {f"{name}.{leaf}": self._split_axis for name in self.targets},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


def merge_lora(chunks: Sequence[torch.nn.Module]) -> int:
    """Merge LoRA into the dense weights of this rank's model chunks, in place.

    The model computes the same as before, to rounding, and its adapters add nothing any more.

    Returns:
        How many layers were merged.
    """
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.merge()
    return len(layers)
