"""The C-Abstractor of Honeybee (arXiv 2312.06742), which MM1 and MM1.5 use: convolutions keep the places of patches.

Learned positions, residual blocks, average pooling to a square of tokens, residual blocks, an MLP. The blocks are
RegNet's (arXiv 2003.13678) as timm's ``RegStage`` builds them with SiLU and LayerNorm: 1 x 1, depth-wise 3 x 3, squeeze
and excitation, 1 x 1. What MM1 changed, if anything, is not published. Shape letters: T tiles, P patches, K tokens, D
channels, h and w rows and columns.
"""

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.config import Config
from megavlm.models.backend import Backend
from megavlm.models.connectors.average_pooling import pool_grid
from megavlm.models.connectors.layers import layer_norm, learned, linear, replicated_config, token_side
from megavlm.models.connectors.products import FeatureShape, Products
from megavlm.models.learned_positions import stretch

_KERNEL = 3


class CAbstractorConfig(Config):
    """Honeybee's C-Abstractor. The defaults are MM1's 144 tokens."""

    kind: Literal["c_abstractor"] = "c_abstractor"
    num_tokens: pydantic.PositiveInt = 144
    """Tokens of a tile, a square number (Honeybee: 144 or 256)."""
    hidden_size: pydantic.PositiveInt = 1024
    """Channels of the blocks."""
    depth: pydantic.PositiveInt = 3
    """Blocks before the pooling, and as many behind it."""
    mlp_depth: pydantic.PositiveInt = 2
    """Linear layers behind the blocks, with SiLU between them."""
    group_size: pydantic.PositiveInt = 1
    """Channels that a 3 x 3 convolution mixes (1: depth-wise, timm's default)."""
    position_side: pydantic.PositiveInt | None = None
    """Patches along a side of the grid that the learned positions are of; None: the tile's. Give it in a stage of
    higher resolution that goes on from a lower one: positions are kept as they were learned and stretched (bicubic)."""
    layernorm_epsilon: pydantic.PositiveFloat = 1e-5
    """Epsilon of every LayerNorm (timm: 1e-5 behind a convolution)."""
    init_method_std: pydantic.PositiveFloat = 0.02
    """Standard deviation of fresh weights and positions."""

    @pydantic.model_validator(mode="after")
    def _groups_fit(self) -> "CAbstractorConfig":
        if self.hidden_size % self.group_size:
            raise ValueError(
                f"model.connector.group_size={self.group_size}: does not divide hidden_size={self.hidden_size}. Change "
                "one of them."
            )
        return self

    def tokens_per_tile(self, num_patches: int) -> int:
        """Tokens K that one tile of ``num_patches`` features becomes.

        Raises:
            ValueError: tokens or patches are no square, or the tokens are more than the patches.
        """
        return token_side(self.kind, self.num_tokens, num_patches) ** 2

    def block_inputs(self, input_size: int) -> tuple[list[int], list[int]]:
        """Input channels of the blocks before and behind the pooling."""
        inside = [self.hidden_size] * self.depth
        return [input_size, *inside[1:]], inside

    def count_products(self, products: Products, shape: FeatureShape, needs_features: bool) -> bool:
        """Tell the matrix products of a forward pass; see :class:`megavlm.models.connectors.ConnectorConfig`."""
        num_tokens = shape.num_tiles * self.tokens_per_tile(shape.num_patches)
        needs = needs_features or products.trains("positions")
        before, behind = self.block_inputs(shape.input_size)
        for stage, num_places, inputs in (
            ("before_pooling", shape.num_vectors, before),
            ("behind_pooling", num_tokens, behind),
        ):
            for number, input_size in enumerate(inputs):
                block = products.within(f"{stage}.{number}")
                needs = self._count_block(block, shape.num_tiles, num_places, input_size, needs)
        for number, (input_size, output_size) in enumerate(self.mlp_widths(shape.output_size)):
            needs = products.linear(f"mlp.{number}", num_tokens, input_size, output_size, needs)
        return needs

    def mlp_widths(self, output_size: int) -> list[tuple[int, int]]:
        """Input and output widths of the linear layers behind the blocks."""
        return list(itertools.pairwise([self.hidden_size, *[output_size] * self.mlp_depth]))

    def _count_block(
        self, products: Products, num_tiles: int, num_places: int, input_size: int, needs_input: bool
    ) -> bool:
        width, squeezed = self.hidden_size, squeezed_width(input_size)
        states = products.linear("reduce", num_places, input_size, width, needs_input, bias=False)
        states = products.norm("reduce_norm", states)
        states = products.matrix(["mix"], num_places, _KERNEL**2 * self.group_size, width, states)
        states = products.norm("mix_norm", states)
        gate = products.linear("squeeze", num_tiles, width, squeezed, states)
        gate = products.linear("excite", num_tiles, squeezed, width, gate)
        states = products.linear("expand", num_places, width, width, states or gate, bias=False)
        states = products.norm("expand_norm", states)
        grid = needs_input
        if input_size != width:
            grid = products.linear("shortcut", num_places, input_size, width, grid, bias=False)
            grid = products.norm("shortcut_norm", grid)
        return states or grid

    def build(
        self,
        input_size: int,
        output_size: int,
        megatron_settings: Mapping[str, Any],
        backend: Backend,
        *,
        num_patches: int,
    ) -> "CAbstractor":
        """Make the connector: ``[T, P, input_size]`` -> ``[T, num_tokens, output_size]``.

        Raises:
            ValueError: tokens or patches are no square, the tokens are more than the patches, or FP8 is asked for.
        """
        config = replicated_config(self, megatron_settings, self.layernorm_epsilon)
        return CAbstractor(self, config, (num_patches, input_size), output_size, backend)


def squeezed_width(input_size: int) -> int:
    """Channels inside the squeeze and excitation of a block: a quarter of the block's input, as in RegNet."""
    return max(1, round(input_size / 4))


class CAbstractor(MegatronModule):
    """Positions, blocks, pooling, blocks and an MLP, whole on every tensor-parallel rank."""

    def __init__(
        self,
        config: CAbstractorConfig,
        transformer_config: TransformerConfig,
        patch_shape: tuple[int, int],
        output_size: int,
        backend: Backend,
    ) -> None:
        super().__init__(transformer_config)
        num_patches, input_size = patch_shape
        self.side = token_side(config.kind, config.num_tokens, num_patches)
        self.positions = learned(transformer_config, (config.position_side or round(num_patches**0.5)) ** 2, input_size)

        def stage(inputs: list[int]) -> torch.nn.Sequential:
            return torch.nn.Sequential(*(_Block(config, transformer_config, size, backend) for size in inputs))

        before, behind = config.block_inputs(input_size)
        self.before_pooling = stage(before)
        self.behind_pooling = stage(behind)
        self.mlp = torch.nn.ModuleList(
            linear(transformer_config, *widths, bias=True) for widths in config.mlp_widths(output_size)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Abstract ``[T, P, D]`` -> ``[T, K, hidden]``, tokens row by row."""
        side = round(features.shape[1] ** 0.5)
        grid = (features + stretch(self.positions, side)).unflatten(1, (side, side))
        pooled = pool_grid(self.before_pooling(grid).flatten(1, 2), self.side)
        tokens = self.behind_pooling(pooled.unflatten(1, (self.side, self.side))).flatten(1, 2)
        tokens = self.mlp[0](tokens)
        for layer in self.mlp[1:]:
            tokens = layer(F.silu(tokens))
        return tokens


class _Block(torch.nn.Module):
    """A bottleneck of RegNet on ``[T, h, w, D]``: channels stand last, so that 1 x 1 convolutions are linear layers."""

    def __init__(
        self, config: CAbstractorConfig, transformer_config: TransformerConfig, input_size: int, backend: Backend
    ) -> None:
        super().__init__()
        width, squeezed = config.hidden_size, squeezed_width(input_size)
        self.groups = width // config.group_size
        self.reduce = linear(transformer_config, input_size, width, bias=False)
        self.reduce_norm = layer_norm(transformer_config, backend, width)
        self.mix = learned(transformer_config, width, config.group_size, _KERNEL, _KERNEL)
        self.mix_norm = layer_norm(transformer_config, backend, width)
        self.squeeze = linear(transformer_config, width, squeezed, bias=True)
        self.excite = linear(transformer_config, squeezed, width, bias=True)
        self.expand = linear(transformer_config, width, width, bias=False)
        self.expand_norm = layer_norm(transformer_config, backend, width)
        self.shortcut = self.shortcut_norm = None
        if input_size != width:
            self.shortcut = linear(transformer_config, input_size, width, bias=False)
            self.shortcut_norm = layer_norm(transformer_config, backend, width)

    def forward(self, grid: Tensor) -> Tensor:
        """``[T, h, w, D_in]`` -> ``[T, h, w, D]``."""
        states = F.silu(self.reduce_norm(self.reduce(grid)))
        mixed = F.conv2d(states.permute(0, 3, 1, 2), self.mix, padding=_KERNEL // 2, groups=self.groups)
        states = F.silu(self.mix_norm(mixed.permute(0, 2, 3, 1)))
        gate = self.excite(F.silu(self.squeeze(states.mean((1, 2), keepdim=True))))
        states = self.expand_norm(self.expand(states * torch.sigmoid(gate)))
        if self.shortcut is not None and self.shortcut_norm is not None:
            grid = self.shortcut_norm(self.shortcut(grid))
        return F.silu(states + grid)
