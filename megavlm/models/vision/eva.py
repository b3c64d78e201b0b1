"""EVA's ViT (arXiv 2211.07636) as BLIP-2 uses it: ``transformers``' Blip2VisionModel, ViT-g/14 and its like.

EVA has no bias on keys. Such a bias moves all scores of a query alike, so it changes nothing and gets no gradient; it
exists here, as in ``transformers``, and stays where it starts, at zero.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType

from megavlm.models.backend import Backend, attention_spec, layer_spec
from megavlm.models.vision.transformer import Traits, VisionTransformer, VisionTransformerConfig


class EvaConfig(VisionTransformerConfig):
    """EVA ViT: LayerNorms, GELU, biases everywhere, learned positions, a LayerNorm at the end (BLIP-2's ``ln_vision``).

    ViT-g/14 has 40 layers, of which BLIP-2 drops the last: ``num_layers: 40, select_layer: -2``, or ``num_layers: 39``
    for weights that hold 39.
    """

    kind: Literal["eva"] = "eva"
    post_layernorm: bool = True
    """LayerNorm behind the last layer that is built. BLIP-2 trains one of its own there, between the frozen encoder and
    the Q-Former."""
    add_qkv_bias: bool = True
    """Bias on queries, keys and values (published: yes)."""
    layernorm_epsilon: pydantic.PositiveFloat = 1e-6
    """Epsilon of every LayerNorm."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each colour, on the scale 0 to 1."""
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of each colour, on the scale 0 to 1."""

    @property
    def traits(self) -> Traits:
        """Which parameters it has beside the matrices."""
        return Traits(qkv_bias=self.add_qkv_bias, post_layernorm=self.post_layernorm)

    def build(self, megatron_settings: Mapping[str, Any], backend: Backend) -> VisionTransformer:
        """Make the encoder: ``[T, 3, H, W]`` -> ``[T, P, D]``.

        Args:
            megatron_settings: TransformerConfig arguments that come from the layout and the precision.
            backend: where the layers come from.

        Raises:
            ValueError: the feed-forward width does not divide by the tensor-parallel size.
        """
        config = self.transformer_config(
            megatron_settings,
            normalization="LayerNorm",
            layernorm_epsilon=self.layernorm_epsilon,
            activation_func=F.gelu,
            add_bias_linear=True,
        )
        embedding = self.tile_embedding(config)
        attention = attention_spec(backend, AttnMaskType.no_mask, qkv_bias=self.add_qkv_bias)
        return VisionTransformer(self, config, embedding, layer_spec(backend, attention), backend)
