"""What a recipe can say about the decoder, and the layers that follow from it."""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config import Config
from megavlm.models.backend import Backend, attention_spec, layer_spec
from megavlm.models.lora import LoraConfig, unfused, with_lora
from megavlm.models.moe import MoEConfig, moe_spec


class LanguageConfig(Config):
    """Shape of the decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention. Names are megatron-core's."""

    kind: Literal["decoder"] = "decoder"
    num_layers: pydantic.PositiveInt
    """Decoder layers."""
    hidden_size: pydantic.PositiveInt
    """Width of the residual stream."""
    ffn_hidden_size: pydantic.PositiveInt
    """Width inside the gated feed-forward layer."""
    moe: MoEConfig | None = None
    """Experts in place of the feed-forward layers; None: every layer is dense."""
    num_attention_heads: pydantic.PositiveInt
    """Query heads."""
    num_query_groups: pydantic.PositiveInt | None = None
    """Key/value heads; None: as many as query heads."""
    kv_channels: pydantic.PositiveInt | None = None
    """Channels of a head; None: hidden_size / num_attention_heads."""
    vocab_size: pydantic.PositiveInt | None = None
    """Tokens of the vocabulary, the image token included; None: as many as the tokenizer has."""
    make_vocab_size_divisible_by: pydantic.PositiveInt = 128
    """The embedding is padded to a multiple of this; padded tokens are never predicted."""
    add_qkv_bias: bool = False
    """Bias on queries, keys and values (Qwen2: yes, Llama: no)."""
    share_embeddings_and_output_weights: bool = False
    """One matrix for the input embedding and the output layer."""
    layernorm_epsilon: pydantic.PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    rotary_base: pydantic.PositiveInt = 10000
    """Base period of the rotary positions (theta)."""
    rope_scaling_factor: pydantic.PositiveFloat | None = None
    """Llama-3.1's stretching of low rotary frequencies; None: off."""
    init_method_std: pydantic.PositiveFloat = 0.02
    """Standard deviation of fresh weights; writers to the residual stream get 1 / sqrt(2 * num_layers) of it."""
    lora: LoraConfig | None = None
    """Low-rank adapters beside the decoder's linear layers, which train as the part ``lora``; None: there are none."""
    attention_dropout: pydantic.NonNegativeFloat = 0.0
    hidden_dropout: pydantic.NonNegativeFloat = 0.0

    @property
    def head_channels(self) -> int:
        """Channels of a head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_width(self) -> int:
        """Channels of all query heads."""
        return self.num_attention_heads * self.head_channels

    @property
    def key_width(self) -> int:
        """Channels of all key heads; values have as many."""
        return (self.num_query_groups or self.num_attention_heads) * self.head_channels

    @pydantic.model_validator(mode="after")
    def _heads_fit(self) -> "LanguageConfig":
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.language.hidden_size={self.hidden_size}: is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}. Change one, or give kv_channels."
            )
        if self.num_attention_heads % (self.num_query_groups or self.num_attention_heads):
            raise ValueError(
                f"model.language.num_attention_heads={self.num_attention_heads}: is not a multiple of "
                f"num_query_groups={self.num_query_groups}. Each key/value head serves a whole number of query heads."
            )
        with_experts = self.layers_with_experts  # raises
        if self.lora is not None:
            self.lora.check(self.num_layers, with_experts)
        return self

    @property
    def num_moe_experts(self) -> int | None:
        """Experts of a layer that has any; None: every layer is dense."""
        return None if self.moe is None else self.moe.num_moe_experts

    @property
    def layers_with_experts(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        has_experts = [] if self.moe is None else self.moe.has_experts(self.num_layers)
        return tuple(layer for layer, has in enumerate(has_experts) if has)

    def transformer_config(self, megatron_settings: Mapping[str, Any]) -> TransformerConfig:
        """Return megatron-core's config of the decoder.

        Args:
            megatron_settings: the arguments that come from layout and precision.
        """
        return TransformerConfig(
            **megatron_settings,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups or self.num_attention_heads,
            kv_channels=self.kv_channels,
            normalization="RMSNorm",
            layernorm_epsilon=self.layernorm_epsilon,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            add_qkv_bias=self.add_qkv_bias,
            init_method_std=self.init_method_std,
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.hidden_dropout,
            **({} if self.moe is None else self.moe.megatron_fields(self.ffn_hidden_size)),
        )


def decoder_layer_specs(
    config: LanguageConfig,
    transformer_config: TransformerConfig,
    backend: Backend,
    expert_backend: Backend | None = None,
) -> list[ModuleSpec]:
    """One spec per decoder layer of the whole model, first to last; the experts' layers may come from elsewhere."""
    if config.lora is not None:
        backend = unfused(backend)
    attention = attention_spec(backend, AttnMaskType.causal)
    layers = [layer_spec(backend, attention)] * config.num_layers
    for index in config.layers_with_experts:
        layers[index] = layer_spec(backend, attention, mlp=moe_spec(expert_backend or backend, transformer_config))
    if config.lora is not None:
        layers = [with_lora(layer, config.lora, number) for number, layer in enumerate(layers)]
    return layers
