"""InternViT, the vision encoder of InternVL and NVLM (arXiv 2312.14238; 300M and 6B).

Both sizes are settings: the 6B has RMSNorm, QK-norm over the full width and no bias on queries, keys and values; the
300M has LayerNorm, no QK-norm and that bias. Neither has a norm after its last layer. Shape letters: S sequence, N rows
of a batch, H heads (of this tensor-parallel rank), D channels of a head.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megavlm.models.backend import Backend, attention_spec, layer_spec
from megavlm.models.vision.layer_scale import LayerScale
from megavlm.models.vision.transformer import Traits, VisionTransformer, VisionTransformerConfig
from megavlm.models.weights import start_at
from megavlm.runtime import current_device


class InternViTConfig(VisionTransformerConfig):
    """InternViT: layer scale on both branches, GELU, learned positions, class token dropped."""

    kind: Literal["internvit"] = "internvit"
    normalization: Literal["RMSNorm", "LayerNorm"]
    """Norm of the layers: RMSNorm for the 6B, LayerNorm for the 300M."""
    qk_layernorm: bool
    """RMSNorm of queries and of keys over all heads together (6B: yes, 300M: no)."""
    add_qkv_bias: bool
    """Bias on queries, keys and values (6B: no, 300M: yes)."""
    layernorm_epsilon: pydantic.PositiveFloat = 1e-6
    """Epsilon of every norm, QK-norm included."""
    layer_scale: pydantic.PositiveFloat = 0.1
    """Value that a fresh encoder's layer scales start at."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each colour, on the scale 0 to 1."""
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of each colour, on the scale 0 to 1."""

    @property
    def traits(self) -> Traits:
        """Which parameters it has beside the matrices."""
        return Traits(
            qkv_bias=self.add_qkv_bias,
            norm_bias=self.normalization == "LayerNorm",
            qk_layernorm=self.qk_layernorm,
            layer_scale=True,
        )

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
            normalization=self.normalization,
            layernorm_epsilon=self.layernorm_epsilon,
            activation_func=F.gelu,
            add_bias_linear=True,
        )
        embedding = self.tile_embedding(config)
        return VisionTransformer(self, config, embedding, self._layer(config, backend), backend)

    def _layer(self, config: TransformerConfig, backend: Backend) -> ModuleSpec:
        qk_norm: Any = ModuleSpec(module=FullWidthRMSNorm, params={"full_width": self.hidden_size})
        attention = attention_spec(
            backend,
            AttnMaskType.no_mask,
            qk_norm=qk_norm if self.qk_layernorm else IdentityOp,
            qkv_bias=self.add_qkv_bias,
        )
        residual = ModuleSpec(module=LayerScale, params={"config": config, "scale": self.layer_scale})
        return layer_spec(backend, attention, residual=residual)


class FullWidthRMSNorm(torch.nn.Module):
    """RMSNorm of queries or keys over all heads together, not head by head.

    Heads are split over tensor-parallel ranks, so the sum of squares is added up over them. Dummy heads add zero to it,
    and it is divided by the real width.
    """

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float, full_width: int) -> None:
        """Make the weights.

        Args:
            hidden_size: channels of a head (as megatron-core asks for it).
            config: of the layer.
            eps: added to the mean square.
            full_width: channels of all real heads.
        """
        super().__init__()
        width = config.num_attention_heads // config.tensor_model_parallel_size * hidden_size
        weight = torch.ones(width, dtype=config.params_dtype, device=current_device())
        self.weight = start_at(torch.nn.Parameter(weight), 1.0)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        self.eps = eps
        self.full_width = full_width

    def forward(self, states: Tensor) -> Tensor:
        """Normalise ``[S, N, H, D]``; statistics are float32."""
        flat = states.flatten(2)
        squares = flat.float().square().sum(-1, keepdim=True)
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            # Every rank uses the sum, so the sum's gradient is the sum over ranks as well: reduce both ways.
            squares = tensor_parallel.reduce_from_tensor_model_parallel_region(squares)
            squares = tensor_parallel.copy_to_tensor_model_parallel_region(squares)
        scale = torch.rsqrt(squares / self.full_width + self.eps)
        return ((flat * scale).to(states.dtype) * self.weight).view(states.shape)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the weight, split over tensor-parallel ranks."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
