"""Flamingo's gated block: cross-attention and a feed-forward layer before a decoder layer.

GATED XATTN-DENSE (arXiv 2204.14198, section 2.2 and figure 4) changes what a decoder layer is given, y, to
``y + tanh(a) * attention(norm(y), context)`` and then to ``y + tanh(b) * feed_forward(norm(y))``. Both gates normally
start at zero, so that a fresh block changes nothing. Unlike the attention, the feed-forward layer changes tokens that
see nothing too.

The block is a ``TransformerLayer`` of megatron-core without self-attention: recomputation, sequence parallelism, FP8
and sharded checkpoints are that layer's.
"""

import copy
import dataclasses
from typing import Any, Literal

import pydantic
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megavlm.config import Config
from megavlm.models.backend import Backend
from megavlm.models.cross_attention import GatedResidual, with_cross_attention


class GatedFeedForwardConfig(Config):
    """The feed-forward layer behind a gated cross-attention. The defaults are Flamingo's; there are no biases."""

    ffn_hidden_size: pydantic.PositiveInt | None = None
    """Width inside; None: four times the decoder's."""
    activation: Literal["squared_relu", "swiglu"] = "squared_relu"
    """Flamingo: squared_relu; Idefics: swiglu, of the decoder's ffn_hidden_size."""

    def width(self, hidden_size: int) -> int:
        """Width inside, in a decoder of ``hidden_size``."""
        return self.ffn_hidden_size or 4 * hidden_size


@dataclasses.dataclass(frozen=True)
class GatedBlockSpec:
    """What a block is made of."""

    backend: Backend
    """Where norms and linear layers come from."""
    gate_init: float
    """Value of both gates of a fresh block, before their tanh."""
    feed_forward: GatedFeedForwardConfig

    def build(self, config: TransformerConfig, **place: Any) -> TransformerLayer:
        """Make the block.

        Args:
            config: of the decoder.
            place: the other arguments of a ``TransformerLayer``: its layer number and where it is in the layout.
        """
        block_config = copy.copy(config)
        is_swiglu = self.feed_forward.activation == "swiglu"
        block_config.ffn_hidden_size = self.feed_forward.width(config.hidden_size)
        block_config.gated_linear_unit = is_swiglu
        block_config.activation_func = F.silu if is_swiglu else squared_relu
        block_config.bias_activation_fusion = config.bias_activation_fusion and is_swiglu  # there is no other
        mlp = MLPSubmodules(linear_fc1=self.backend.column_parallel_linear, linear_fc2=self.backend.row_parallel_linear)
        nothing_before = ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=self.backend.norm,
                mlp=ModuleSpec(module=MLP, submodules=mlp),
                # megatron-core hands its config to the residual of cross-attention only
                mlp_bda=ModuleSpec(module=GatedResidual, params={"config": block_config, "gate_init": self.gate_init}),
            ),
        )
        block = with_cross_attention(nothing_before, self.backend, gate_init=self.gate_init)
        return TransformerLayer(block_config, block.submodules, **place)


def with_gated_block(layer: ModuleSpec, block: GatedBlockSpec) -> ModuleSpec:
    """Return a decoder layer's spec with a gated block before the layer.

    Args:
        layer: of a megatron-core ``TransformerLayer``.
        block: what the block is made of.
    """
    assert layer.module is TransformerLayer, layer.module
    return dataclasses.replace(layer, module=GatedBlockLayer, params={**layer.params, "block": block})


class GatedBlockLayer(TransformerLayer):
    """A decoder layer that is given what a gated block has made of the hidden states."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        block: GatedBlockSpec,
        **place: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **place)
        self.gated_block = block.build(config, layer_number=layer_number, **place)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Run block and layer.

        Args:
            hidden_states: ``[S, N, hidden]``, split over the sequence under sequence parallelism.
            kwargs: of a ``TransformerLayer``; ``context`` and ``context_mask`` are those of
                :class:`megavlm.models.cross_attention.CrossAttention`.

        Returns:
            ``[S, N, hidden]``, split likewise, and the context.
        """
        hidden_states, _ = self.gated_block(
            hidden_states,
            context=kwargs.get("context"),
            context_mask=kwargs.get("context_mask"),
            inference_context=kwargs.get("inference_context"),
        )
        return super().forward(hidden_states, **kwargs)
