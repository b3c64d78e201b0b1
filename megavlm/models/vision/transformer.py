"""What the vision transformers have in common: their config's fields, and the module around megatron-core's layers.

A kind adds its own fields, its layer spec and its family's constants (``clip.py``, ``internvit.py``). Shape letters: T
tiles, P patches of a tile, D hidden width.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import pydantic
import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.config import Config
from megavlm.models.backend import Backend, block_spec
from megavlm.models.first_stage import first_stage_config
from megavlm.models.vision.tile_embedding import TileEmbedding
from megavlm.models.weights import mark_padded

_HEAD_SHARDED = (
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_proj.weight",
    "q_layernorm.weight",
    "k_layernorm.weight",
)


class Traits(NamedTuple):
    """Which parameters a kind has beside the matrices."""

    patch_bias: bool = True
    """Bias of the patch projection."""
    qkv_bias: bool = True
    norm_bias: bool = True
    """Whether the layers' norms are LayerNorms."""
    qk_layernorm: bool = False
    layer_scale: bool = False
    pre_layernorm: bool = False
    """A norm before the first layer."""
    post_layernorm: bool = False
    """A norm after the last layer that is built."""


class VisionTransformerConfig(Config):
    """Fields of every vision transformer. Names of the layers' numbers are megatron-core's."""

    image_size: pydantic.PositiveInt
    """Side of a square tile, pixels."""
    patch_size: pydantic.PositiveInt
    """Side of a square patch, pixels."""
    num_layers: pydantic.PositiveInt
    """Layers of the published encoder; ``select_layer`` decides how many are built."""
    hidden_size: pydantic.PositiveInt
    """Width D of the features."""
    ffn_hidden_size: pydantic.PositiveInt
    """Width inside the feed-forward layer."""
    num_attention_heads: pydantic.PositiveInt
    """Real heads. Where tensor parallelism does not divide them, zero dummy heads are added."""
    select_layer: pydantic.NegativeInt = -1
    """Whose output are the features: -1 the last layer's, -2 the last but one's (which is then never built)."""
    keep_class_token: bool = False
    """Give the class token's output as first feature; published models drop it."""
    init_method_std: pydantic.PositiveFloat = 0.02
    """Standard deviation of fresh weights."""
    image_mean: tuple[float, float, float]
    """Mean of each colour, on the scale 0 to 1; each kind has its own."""
    image_std: tuple[float, float, float]
    """Standard deviation of each colour, on the scale 0 to 1; each kind has its own."""
    pretrained_image_size: pydantic.PositiveInt | None = None
    """Side of the images that the learned positions are of; None: ``image_size``. Where the two differ, the positions
    are stretched to the tile's grid (MM1: a ViT of 378 pixels at 672)."""

    has_class_token: ClassVar[bool] = True
    """Whether the kind has a class token."""
    cuts_tiles: ClassVar[bool] = False
    """Whether a tile may be no whole number of patches wide; what is left over is then not seen."""

    @pydantic.model_validator(mode="after")
    def _sizes_fit(self) -> "VisionTransformerConfig":
        for divisor in ("num_attention_heads",) if self.cuts_tiles else ("patch_size", "num_attention_heads"):
            whole = "image_size" if divisor == "patch_size" else "hidden_size"
            if getattr(self, whole) % getattr(self, divisor):
                raise ValueError(
                    f"model.vision.{whole}={getattr(self, whole)}: is not a multiple of "
                    f"{divisor}={getattr(self, divisor)}. Change one of them."
                )
        if self.patch_size > self.image_size:
            raise ValueError(
                f"model.vision.image_size={self.image_size}: is smaller than patch_size={self.patch_size}. "
                "Change one of them."
            )
        pretrained_size = self.pretrained_image_size or self.image_size
        if not self.cuts_tiles and pretrained_size % self.patch_size:
            raise ValueError(
                f"model.vision.pretrained_image_size={pretrained_size}: is not a multiple of "
                f"patch_size={self.patch_size}. Change one of them."
            )
        if pretrained_size < self.patch_size:
            raise ValueError(
                f"model.vision.pretrained_image_size={pretrained_size}: is smaller than patch_size={self.patch_size}. "
                "Change one of them."
            )
        if self.keep_class_token and not self.has_class_token:
            raise ValueError("model.vision.keep_class_token=True: this kind has no class token. Set it to false.")
        if -self.select_layer > self.num_layers:
            raise ValueError(
                f"model.vision.select_layer={self.select_layer}: the encoder has num_layers={self.num_layers}. "
                f"Choose -1 to -{self.num_layers}."
            )
        return self

    @property
    def traits(self) -> Traits:
        """Which parameters it has beside the matrices."""
        return Traits()

    def tile_embedding(self, config: TransformerConfig) -> TileEmbedding:
        """Make the layer before the first one."""
        return TileEmbedding(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            has_bias=self.traits.patch_bias,
            image_mean=self.image_mean,
            image_std=self.image_std,
            dtype=config.params_dtype,
            position_side=self.position_side,
            has_class_token=self.has_class_token,
        )

    @property
    def num_patches(self) -> int:
        """Features P that one tile gives (the class token counts only where it is kept)."""
        return (self.image_size // self.patch_size) ** 2 + self.keep_class_token

    @property
    def encoders(self) -> tuple["VisionTransformerConfig", ...]:
        """The encoders that this kind is made of: itself."""
        return (self,)

    @property
    def position_side(self) -> int:
        """Patches along a side of the grid that the learned positions are of."""
        return (self.pretrained_image_size or self.image_size) // self.patch_size

    @property
    def num_layers_built(self) -> int:
        """Layers up to the selected one."""
        return self.num_layers + 1 + self.select_layer

    @property
    def num_ffn_inputs(self) -> int:
        """Projections from ``hidden_size`` to ``ffn_hidden_size``: one, or two where a gate multiplies the other."""
        return 1

    def check_layout(self, tensor_model_parallel_size: int) -> None:
        """Check that the encoder can be split. Any number of heads can: dummy heads fill up.

        Raises:
            ValueError: the feed-forward width does not divide by the tensor-parallel size.
        """
        if self.ffn_hidden_size % tensor_model_parallel_size:
            raise ValueError(
                f"model.vision.ffn_hidden_size={self.ffn_hidden_size}: is not a multiple of "
                f"tensor_model_parallel_size={tensor_model_parallel_size}. Choose a size that divides it."
            )

    def transformer_config(self, megatron_settings: Mapping[str, Any], **fields: Any) -> TransformerConfig:
        """Return megatron-core's config of the layers, heads padded to a multiple of the tensor-parallel size.

        Args:
            megatron_settings: TransformerConfig arguments that come from the layout and the precision.
            fields: what the kind adds (normalization, activation_func, biases).

        Raises:
            ValueError: the feed-forward width does not divide by the tensor-parallel size.
        """
        tp = megatron_settings.get("tensor_model_parallel_size", 1)
        self.check_layout(tp)
        num_heads = -(-self.num_attention_heads // tp) * tp
        return first_stage_config(
            megatron_settings,
            num_layers=self.num_layers_built,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=num_heads,
            num_query_groups=num_heads,
            kv_channels=self.hidden_size // self.num_attention_heads,
            init_method_std=self.init_method_std,
            **fields,
        )


class VisionTransformer(MegatronModule):
    """Tile embedding and pre-norm layers; a norm before the first and after the last where a kind has it."""

    def __init__(
        self,
        config: VisionTransformerConfig,
        transformer_config: TransformerConfig,
        embedding: TileEmbedding,
        layer: ModuleSpec,
        backend: Backend,
    ) -> None:
        """Build the encoder.

        Args:
            config: of the kind.
            transformer_config: see :meth:`VisionTransformerConfig.transformer_config`.
            embedding: tiles to hidden states.
            layer: spec of one layer; its attention must see both ways.
            backend: where the norms come from.
        """
        super().__init__(transformer_config)
        self.num_dropped = int(config.has_class_token and not config.keep_class_token)
        self.embedding = embedding
        norm = functools.partial(
            backend.norm,
            config=transformer_config,
            hidden_size=transformer_config.hidden_size,
            eps=transformer_config.layernorm_epsilon,
        )
        self.pre_layernorm = norm() if config.traits.pre_layernorm else None
        self.post_layernorm = norm() if config.traits.post_layernorm else None
        self.encoder = TransformerBlock(
            config=transformer_config,
            spec=block_spec(backend, [layer] * transformer_config.num_layers),
            post_layer_norm=False,
        )
        if transformer_config.num_attention_heads != config.num_attention_heads:
            self._mark_dummy_heads(config.hidden_size)

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            tiles: ``[T, 3, H, W]``: uint8 pixels, or floats already normalised.

        Returns:
            ``[T, P, D]`` (a view: its memory is ``[P, T, D]``).

        Raises:
            ValueError: the tiles have another shape than the encoder takes.
        """
        hidden_states = self.embedding(tiles)
        if self.pre_layernorm is not None:
            hidden_states = self.pre_layernorm(hidden_states)
        features = self.encoder(hidden_states, attention_mask=None)
        if self.post_layernorm is not None:
            features = self.post_layernorm(features)
        return features[self.num_dropped :].transpose(0, 1)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return megatron-core's sharded state dict; tensors split over heads load under any number of dummy heads."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, tensor in sharded.items():
            if name.endswith(_HEAD_SHARDED):
                tensor.allow_shape_mismatch = True
        return sharded

    def _mark_dummy_heads(self, real_width: int) -> None:
        """Say which rows and columns are real. The dummies stand last and hold zeros.

        A zero head attends evenly to zero values and meets zero columns in the output projection, so it adds nothing
        and every gradient of its weights is zero: it stays zero.
        """
        unpadded: dict[str, Callable[[torch.Size], tuple[int, ...]]] = {
            "linear_qkv.weight": lambda shape: (3 * real_width, shape[1]),
            "linear_qkv.bias": lambda shape: (3 * real_width,),
            "linear_proj.weight": lambda shape: (shape[0], real_width),
            "q_layernorm.weight": lambda shape: (real_width,),
            "k_layernorm.weight": lambda shape: (real_width,),
        }
        for name, parameter in self.encoder.named_parameters():
            leaf = ".".join(name.split(".")[-2:])
            if leaf in unpadded:
                mark_padded(parameter, unpadded[leaf](parameter.shape))
