"""Fusion: how image features reach the language model.

A kind is one file here and one row in :data:`FUSIONS`. Its config says which layers the decoder is made of and what
happens to features and embeddings on the first pipeline stage.
"""

from megavlm.models.fusion.decoder_only import DecoderOnlyConfig

FUSIONS: dict[str, type] = {
    "decoder_only": DecoderOnlyConfig,
}

AnyFusionConfig = DecoderOnlyConfig
