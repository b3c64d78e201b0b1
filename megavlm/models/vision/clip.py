"""The vision tower of CLIP (arXiv 2103.00020), as LLaVA and others use it: patch features of an inner layer."""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megavlm.models.backend import Backend, attention_spec, layer_spec
from megavlm.models.vision.transformer import Traits, VisionTransformer, VisionTransformerConfig


def quick_gelu(hidden_states: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``, through SiLU's fused kernel: one saved tensor instead of two."""
    return F.silu(hidden_states * 1.702) * (1 / 1.702)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class ClipConfig(VisionTransformerConfig):
    """CLIP ViT: a LayerNorm before the first layer, biases everywhere but in the patch projection, no norm at the end.

    CLIP's norm after the last layer belongs to its image embedding; features are taken before it.
    """

    kind: Literal["clip"] = "clip"
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """OpenAI's weights need quick_gelu; OpenCLIP's and DFN's need gelu."""
    layernorm_epsilon: pydantic.PositiveFloat = 1e-5
    """Epsilon of every LayerNorm."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each colour, on the scale 0 to 1."""
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of each colour, on the scale 0 to 1."""

    @property
    def traits(self) -> Traits:
        """Which parameters it has beside the matrices."""
        return Traits(patch_bias=False, pre_layernorm=True)

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
            activation_func=_ACTIVATIONS[self.activation],
            add_bias_linear=True,
        )
        embedding = self.tile_embedding(config)
        layer = layer_spec(backend, attention_spec(backend, AttnMaskType.no_mask))
        return VisionTransformer(self, config, embedding, layer, backend)
