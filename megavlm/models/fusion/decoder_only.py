"""Decoder-only fusion (NVLM-D, LLaVA): image features take the place of placeholder tokens."""

from typing import Literal

from megatron.core.transformer.spec_utils import ModuleSpec

from megavlm.batch import ALL_AMONG_TOKENS, TileRoute
from megavlm.config import Config
from megavlm.models.backend import Backend


class DecoderOnlyConfig(Config):
    """All image tokens go through the decoder's self-attention."""

    kind: Literal["decoder_only"] = "decoder_only"

    @property
    def tile_route(self) -> TileRoute:
        """Every tile stands among the tokens."""
        return ALL_AMONG_TOKENS

    def cross_attention_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the layers with cross-attention: none."""
        return ()

    def check_layout(self, hidden_size: int, tensor_model_parallel_size: int) -> None:
        """Check that what the fusion adds to the decoder can be split: it adds nothing."""

    def extend(self, layers: list[ModuleSpec], backend: Backend) -> list[ModuleSpec]:
        """Return the specs of the decoder's layers: as they are."""
        return layers
