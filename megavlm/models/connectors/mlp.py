"""The MLP connector: pixel shuffle, norm, one or two linear layers.

Its settings cover NVLM-D and H (arXiv 2409.11402: LayerNorm, two layers without bias), NVLM-X (one layer), InternVL's
``mlp1`` (two biased layers of the language model's width) and LLaVA-1.5's ``mlp2x_gelu`` (the same without shuffle and
norm). Shape letters: T tiles, P patches, K tokens of a tile, D width.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.config import Config
from megavlm.models.backend import Backend
from megavlm.models.connectors.products import FeatureShape, Products
from megavlm.models.first_stage import first_stage_config


class MLPConnectorConfig(Config):
    """Pixel shuffle, LayerNorm and an MLP. The defaults are NVLM-D's and NVLM-H's."""

    kind: Literal["mlp"] = "mlp"
    pixel_shuffle_ratio: float = 0.5
    """0.5: each 2 x 2 block of patches becomes one token, four times as wide. 1: every patch is a token."""
    num_layers: Literal[1, 2] = 2
    """2: linear, GELU, linear. 1: one linear layer."""
    ffn_hidden_size: pydantic.PositiveInt | None = None
    """Width between the two layers; None: the language model's (InternVL, LLaVA). NVLM has its feed-forward width."""
    bias: bool = False
    """Bias of the linear layers (NVLM: no; InternVL, LLaVA: yes)."""
    layernorm: bool = True
    """LayerNorm of the shuffled features before the first layer."""
    layernorm_epsilon: pydantic.PositiveFloat = 1e-5
    """Epsilon of that LayerNorm. Published NVLM-D runs with torch's default 1e-5 in Hugging Face, but Megatron-LM's
    script for it says 1e-6: take the one that the weights are used with."""
    init_method_std: pydantic.PositiveFloat = 0.02
    """Standard deviation of fresh weights."""

    @pydantic.model_validator(mode="after")
    def _fields_fit(self) -> "MLPConnectorConfig":
        if self.pixel_shuffle_ratio not in (0.5, 1.0):
            raise ValueError(
                f"model.connector.pixel_shuffle_ratio={self.pixel_shuffle_ratio}: must be 0.5 or 1. Choose one of them."
            )
        if self.num_layers == 1 and self.ffn_hidden_size is not None:
            raise ValueError(
                f"model.connector.ffn_hidden_size={self.ffn_hidden_size}: num_layers=1 has no inner width. "
                "Leave it out, or set num_layers=2."
            )
        return self

    def tokens_per_tile(self, num_patches: int) -> int:
        """Tokens K that one tile of ``num_patches`` features becomes.

        Raises:
            ValueError: the patches are not a square of even side, which pixel shuffle needs.
        """
        if self.pixel_shuffle_ratio == 1.0:
            return num_patches
        side = math.isqrt(num_patches)
        if side * side != num_patches or side % 2:
            raise ValueError(
                f"model.connector.pixel_shuffle_ratio={self.pixel_shuffle_ratio}: needs a square of patches with an "
                f"even side, and model.vision gives {num_patches} features a tile. Change image_size or patch_size, "
                "drop the class token, or set the ratio to 1."
            )
        return num_patches // 4

    def count_products(self, products: Products, shape: FeatureShape, needs_features: bool) -> bool:
        """Tell the matrix products of a forward pass; see :class:`megavlm.models.connectors.ConnectorConfig`."""
        num_tokens = self.tokens_per_tile(shape.num_patches)
        input_size = shape.input_size * shape.num_patches // num_tokens  # of shuffled patches
        num_vectors = shape.num_tiles * num_tokens
        needs = products.norm("layernorm", needs_features) if self.layernorm else needs_features
        if self.num_layers == 1:
            return products.linear("linear_fc1", num_vectors, input_size, shape.output_size, needs, bias=self.bias)
        inner_size = self.ffn_hidden_size or shape.output_size
        inner = products.linear("linear_fc1", num_vectors, input_size, inner_size, needs, bias=self.bias)
        return products.linear("linear_fc2", num_vectors, inner_size, shape.output_size, inner, bias=self.bias)

    def build(
        self,
        input_size: int,
        output_size: int,
        megatron_settings: Mapping[str, Any],
        backend: Backend,
        *,
        num_patches: int | None = None,
    ) -> "MLPConnector":
        """Make the connector: ``[T, P, input_size]`` -> ``[T, K, output_size]``.

        Args:
            input_size: width of the vision features.
            output_size: width of the language model.
            megatron_settings: TransformerConfig arguments that come from the layout and the precision.
            backend: where the layers come from.
            num_patches: P; this connector holds nothing for each patch and can do without.

        Raises:
            ValueError: a width does not divide by the tensor-parallel size.
        """
        tp = megatron_settings.get("tensor_model_parallel_size", 1)
        split_size = output_size if self.num_layers == 1 else self.ffn_hidden_size or output_size
        if split_size % tp:
            name = "ffn_hidden_size" if self.ffn_hidden_size else "output size (model.language.hidden_size)"
            raise ValueError(
                f"model.connector: its {name}={split_size} is not a multiple of tensor_model_parallel_size={tp}. "
                "Change one of them."
            )
        config = first_stage_config(
            megatron_settings,
            num_layers=1,
            hidden_size=output_size,
            ffn_hidden_size=split_size,
            num_attention_heads=tp,  # there is no attention, but megatron-core's config insists on heads for each rank
            normalization="LayerNorm",
            layernorm_epsilon=self.layernorm_epsilon,
            init_method_std=self.init_method_std,
        )
        return MLPConnector(self, config, input_size, backend)


class MLPConnector(MegatronModule):
    """Pixel shuffle, norm, and tensor-parallel linear layers: by columns, then by rows."""

    def __init__(
        self, config: MLPConnectorConfig, transformer_config: TransformerConfig, input_size: int, backend: Backend
    ) -> None:
        super().__init__(transformer_config)
        self.shuffles = config.pixel_shuffle_ratio == 0.5
        width = input_size * 4 if self.shuffles else input_size
        self.layernorm = None
        if config.layernorm:
            self.layernorm = backend.norm(config=transformer_config, hidden_size=width, eps=config.layernorm_epsilon)
        has_two_layers = config.num_layers == 2
        self.linear_fc1 = backend.column_parallel_linear(
            width,
            transformer_config.ffn_hidden_size,
            config=transformer_config,
            init_method=transformer_config.init_method,
            bias=config.bias,
            gather_output=not has_two_layers,
        )
        self.linear_fc2 = None
        if has_two_layers:
            self.linear_fc2 = backend.row_parallel_linear(
                transformer_config.ffn_hidden_size,
                transformer_config.hidden_size,
                config=transformer_config,
                init_method=transformer_config.init_method,
                bias=config.bias,
                input_is_parallel=True,
                skip_bias_add=False,
            )

    def forward(self, features: Tensor) -> Tensor:
        """Project patch features.

        Args:
            features: ``[T, P, D]``.

        Returns:
            ``[T, K, hidden]``, tokens row by row.
        """
        if self.shuffles:
            features = pixel_shuffle(features)
        if self.layernorm is not None:
            features = self.layernorm(features)
        hidden_states, _ = self.linear_fc1(features)
        if self.linear_fc2 is None:
            return hidden_states
        tokens, _ = self.linear_fc2(F.gelu(hidden_states))
        return tokens


def pixel_shuffle(features: Tensor) -> Tensor:
    """Fold each 2 x 2 block of patches into one token (InternVL's ``ps_version`` v2).

    Args:
        features: ``[T, P, D]``, P a square of even side, row by row.

    Returns:
        ``[T, P / 4, 4 * D]``: tokens row by row; channels are the block's patches in the order top left, top right,
        bottom left, bottom right. (Version v1 leaves the tokens transposed.)
    """
    num_tiles, num_patches, width = features.shape
    half = math.isqrt(num_patches) // 2
    blocks = features.reshape(num_tiles, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(num_tiles, half * half, 4 * width)
