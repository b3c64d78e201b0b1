"""Fusion: how image features reach the language model.

A kind is one file here and one row in :data:`FUSIONS`. Its config says by which route the tiles of an image go
(:class:`megavlm.batch.TileRoute`, which the data follows) and which decoder layers have cross-attention.
"""

from typing import Annotated

import pydantic

from megavlm.models.fusion.context import lay_out_context, sum_tags
from megavlm.models.fusion.cross_attention import CrossAttentionConfig
from megavlm.models.fusion.decoder_only import DecoderOnlyConfig
from megavlm.models.fusion.hybrid import HybridConfig
from megavlm.models.fusion.placeholder import fill_placeholders

FUSIONS: dict[str, type] = {
    "decoder_only": DecoderOnlyConfig,
    "cross_attention": CrossAttentionConfig,
    "hybrid": HybridConfig,
}

AnyFusionConfig = Annotated[
    DecoderOnlyConfig | CrossAttentionConfig | HybridConfig, pydantic.Field(discriminator="kind")
]

__all__ = ["FUSIONS", "AnyFusionConfig", "fill_placeholders", "lay_out_context", "sum_tags"]
