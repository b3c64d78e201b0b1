"""The vision tower of SigLIP (arXiv 2303.15343) and of SigLIP 2 at fixed resolution (arXiv 2502.14786).

Two ways to take features are in use: patch features after the last layer and the norm behind it (PaliGemma, Idefics,
SmolVLM), and those of an inner layer before it (LLaVA, VILA: the last but one). The pooling head is not built.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pydantic
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megavlm.models.backend import Backend, attention_spec, layer_spec
from megavlm.models.vision.transformer import Traits, VisionTransformer, VisionTransformerConfig


def gelu_tanh(hidden_states: Tensor) -> Tensor:
    """GELU by tanh, as SigLIP was trained with (transformers: ``gelu_pytorch_tanh``)."""
    return F.gelu(hidden_states, approximate="tanh")


class SiglipConfig(VisionTransformerConfig):
    """SigLIP ViT: biases everywhere, no class token, no norm before the first layer, one after the last.

    A tile that is no whole number of patches wide is cut at the right and at the bottom, as published (384 pixels are
    27 patches of 14).
    """

    kind: Literal["siglip"] = "siglip"
    post_layernorm: bool = True
    """The published LayerNorm after the last layer; features of an inner layer (``select_layer``) are taken before it:
    set it to false there."""
    layernorm_epsilon: pydantic.PositiveFloat = 1e-6
    """Epsilon of every LayerNorm."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of each colour, on the scale 0 to 1."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Standard deviation of each colour, on the scale 0 to 1."""

    has_class_token: ClassVar[bool] = False
    cuts_tiles: ClassVar[bool] = True

    @pydantic.model_validator(mode="after")
    def _norm_is_behind_the_last_layer(self) -> "SiglipConfig":
        if self.post_layernorm and self.select_layer != -1:
            raise ValueError(
                f"model.vision.select_layer={self.select_layer}: with post_layernorm=True features are the last "
                "layer's, for which its weights are. Set post_layernorm to false, or select_layer to -1."
            )
        return self

    @property
    def traits(self) -> Traits:
        """Which parameters it has beside the matrices."""
        return Traits(post_layernorm=self.post_layernorm)

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
            activation_func=gelu_tanh,
            add_bias_linear=True,
        )
        embedding = self.tile_embedding(config)
        layer = layer_spec(backend, attention_spec(backend, AttnMaskType.no_mask))
        return VisionTransformer(self, config, embedding, layer, backend)
