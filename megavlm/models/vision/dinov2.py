"""DINOv2 (arXiv 2304.07193), as in ``transformers``' Dinov2Model: self-supervised features, small to giant.

The published models were trained at 518 pixels and take any size: their learned positions are stretched to the tile's
grid in every forward pass, as there. ``Dinov2WithRegisters`` is another architecture, which this is not.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec

from megavlm.models.backend import Backend, attention_spec, layer_spec
from megavlm.models.vision.layer_scale import LayerScale
from megavlm.models.vision.transformer import Traits, VisionTransformer, VisionTransformerConfig


class Dinov2Config(VisionTransformerConfig):
    """DINOv2: LayerNorms, layer scale on both branches, GELU or (giant) SwiGLU, class token dropped."""

    kind: Literal["dinov2"] = "dinov2"
    pretrained_image_size: pydantic.PositiveInt  # type: ignore[assignment]  # never None here
    """Side of the images that the learned positions are of (published: 518); not given: ``image_size``, and the other
    way. Where the two differ, the positions are stretched."""
    gated_linear_unit: bool = False
    """SwiGLU instead of GELU in the feed-forward layers (giant: yes; ``ffn_hidden_size`` is then the gated width, 4096
    there)."""
    post_layernorm: bool = True
    """LayerNorm after the last layer that is built, as in ``last_hidden_state``; false: features before it."""
    add_qkv_bias: bool = True
    """Bias on queries, keys and values (published: yes)."""
    layernorm_epsilon: pydantic.PositiveFloat = 1e-6
    """Epsilon of every LayerNorm."""
    layer_scale: pydantic.PositiveFloat = 1.0
    """Value that a fresh encoder's layer scales start at."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each colour, on the scale 0 to 1."""
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of each colour, on the scale 0 to 1."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _one_size_stands_for_both(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        filled = dict(fields)
        for name, other in (("image_size", "pretrained_image_size"), ("pretrained_image_size", "image_size")):
            if filled.get(name) is None and other in fields:
                filled[name] = fields[other]
        return filled

    @property
    def num_ffn_inputs(self) -> int:
        """Projections from ``hidden_size`` to ``ffn_hidden_size``: one, or two where a gate multiplies the other."""
        return 1 + self.gated_linear_unit

    @property
    def traits(self) -> Traits:
        """Which parameters it has beside the matrices."""
        return Traits(qkv_bias=self.add_qkv_bias, layer_scale=True, post_layernorm=self.post_layernorm)

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
            activation_func=F.silu if self.gated_linear_unit else F.gelu,
            gated_linear_unit=self.gated_linear_unit,
            add_bias_linear=True,
        )
        embedding = self.tile_embedding(config)
        attention = attention_spec(backend, AttnMaskType.no_mask, qkv_bias=self.add_qkv_bias)
        residual = ModuleSpec(module=LayerScale, params={"config": config, "scale": self.layer_scale})
        return VisionTransformer(self, config, embedding, layer_spec(backend, attention, residual=residual), backend)
