"""Decoder-only fusion (NVLM-D, LLaVA): image features take the place of placeholder tokens."""

from typing import Literal

from megavlm.batch import ALL_AMONG_TOKENS, TileRoute
from megavlm.config import Config


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
