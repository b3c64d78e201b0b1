"""Gated cross-attention fusion (NVLM-X, arXiv 2409.11402; Flamingo, arXiv 2204.14198).

No image token stands in the text, only the tags of the tiles; each tag sees its own tile.
"""

from typing import Literal

import pydantic
from megatron.core.transformer.spec_utils import ModuleSpec

from megavlm.batch import TileRoute
from megavlm.config import Config
from megavlm.models.backend import Backend
from megavlm.models.cross_attention import with_cross_attention
from megavlm.models.gated_block import GatedBlockSpec, GatedFeedForwardConfig, with_gated_block


class CrossAttentionConfig(Config):
    """All tiles are read by gated cross-attention layers inside the decoder."""

    kind: Literal["cross_attention"] = "cross_attention"
    every_n_layers: pydantic.PositiveInt | None = None
    """One decoder layer in so many has cross-attention. None: a tenth of the layers (at least every one), which gives
    NVLM's: every 6 of 60 and every 8 of 80."""
    first_layer: pydantic.NonNegativeInt = 0
    """The first that has it, counted from 0 (Flamingo: 0; OpenFlamingo: every_n_layers - 1). NVLM does not say."""
    gate_init: float = 0.0
    """Value of a fresh gate, before its tanh. 0 leaves the language model as it was. A model that starts from nothing
    has nothing to keep and learns faster with an open gate (1)."""
    feed_forward: GatedFeedForwardConfig | None = None
    """A gated feed-forward layer behind each cross-attention, and both before the decoder's layer: Flamingo's GATED
    XATTN-DENSE (``{}``: as there). None: cross-attention alone, inside the layer behind its self-attention (NVLM)."""
    text_sees: Literal["all_images", "last_image"] = "all_images"
    """What a token that belongs to no tile sees: the tiles of all images before it in its sample, or of the last one
    (Flamingo). NVLM does not say."""

    @property
    def tile_route(self) -> TileRoute:
        """Every tile is in the context, its tag in the text."""
        return TileRoute(context_tiles="all", context_tags="text", text_sees=self.text_sees)

    def cross_attention_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the layers with cross-attention, of ``num_layers``.

        Raises:
            ValueError: there is none.
        """
        if self.first_layer >= num_layers:
            raise ValueError(
                f"model.fusion.first_layer={self.first_layer}: the language model has {num_layers} layers, counted "
                "from 0, so none would have cross-attention. Lower it."
            )
        return tuple(range(self.first_layer, num_layers, self.interval(num_layers)))

    def interval(self, num_layers: int) -> int:
        """One layer in so many of ``num_layers`` has cross-attention: ``every_n_layers``, or what None stands for."""
        return self.every_n_layers or max(1, num_layers // 10)

    def check_layout(self, hidden_size: int, tensor_model_parallel_size: int) -> None:
        """Check that what cross-attention adds to a decoder of ``hidden_size`` can be split as the decoder is.

        Raises:
            ValueError: the width of its feed-forward layers does not divide by the tensor-parallel size.
        """
        width = 0 if self.feed_forward is None else self.feed_forward.width(hidden_size)
        if width % tensor_model_parallel_size:
            raise ValueError(
                f"model.fusion.feed_forward.ffn_hidden_size={width}: is not a multiple of "
                f"tensor_model_parallel_size={tensor_model_parallel_size}. Choose a size that divides it."
            )

    def extend(self, layers: list[ModuleSpec], backend: Backend) -> list[ModuleSpec]:
        """Return the specs of the decoder's layers, the chosen ones with gated cross-attention."""
        chosen = self.cross_attention_layers(len(layers))
        return [self._extended(layer, backend) if number in chosen else layer for number, layer in enumerate(layers)]

    def _extended(self, layer: ModuleSpec, backend: Backend) -> ModuleSpec:
        if self.feed_forward is None:
            return with_cross_attention(layer, backend, gate_init=self.gate_init)
        block = GatedBlockSpec(backend, self.gate_init, self.feed_forward)
        return with_gated_block(layer, block)
