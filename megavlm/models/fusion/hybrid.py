"""Hybrid fusion (NVLM-H, arXiv 2409.11402 section 4.4): thumbnail in self-attention, other tiles in cross-attention."""

from typing import Literal

from megavlm.batch import TileRoute
from megavlm.models.fusion.cross_attention import CrossAttentionConfig


class HybridConfig(CrossAttentionConfig):
    """The thumbnail (or the only tile of an image) goes through self-attention, the other tiles to cross-attention.

    The thumbnail's image tokens see the tiles of their image, like the text behind them.
    """

    kind: Literal["hybrid"] = "hybrid"  # type: ignore[assignment]
    tag_integration: Literal["add", "concatenate"] = "add"
    """How a regular tile's tag joins its features in the keys and values: added to each of them (the normalised sum of
    the tag's token embeddings), or as tokens before them, as figure 3 of the paper can be read. Cross-attention has no
    positions, so concatenated tags cannot say which features are their tile's."""

    @property
    def tile_route(self) -> TileRoute:
        """Regular tiles and their tags are in the context."""
        return TileRoute(context_tiles="regular", context_tags=self.tag_integration, text_sees=self.text_sees)
