"""What a model is, as data: its parts, and what they have to agree on."""

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from megavlm.config import Config
from megavlm.models.blip2 import QFormerTextConfig
from megavlm.models.connectors import AnyConnectorConfig
from megavlm.models.fusion import AnyFusionConfig
from megavlm.models.fusion.cross_attention import CrossAttentionConfig
from megavlm.models.gated_block import GatedFeedForwardConfig
from megavlm.models.language import LanguageConfig
from megavlm.models.vision import AnyVisionConfig


def _decoder_unless_said(given: Any) -> Any:
    return {"kind": "decoder", **given} if isinstance(given, Mapping) else given


AnyLanguageConfig = Annotated[
    Annotated[LanguageConfig | QFormerTextConfig, pydantic.Field(discriminator="kind")],
    pydantic.BeforeValidator(_decoder_unless_said),
]


class VLMConfig(Config):
    """A model, as data."""

    vision: AnyVisionConfig
    connector: AnyConnectorConfig
    fusion: AnyFusionConfig
    language: AnyLanguageConfig

    @property
    def decoder(self) -> LanguageConfig:
        """The language model, for what only a decoder can do.

        Raises:
            ValueError: the model has none, but the text side of a Q-Former.
        """
        if isinstance(self.language, QFormerTextConfig):
            raise ValueError(
                f"model.language.kind={self.language.kind!r}: BLIP-2's first stage has no language model, and this "
                "needs one. Use the run of its second stage."
            )
        return self.language

    @property
    def learns_from_pairs(self) -> bool:
        """Whether each row is an image and its caption (BLIP-2's first stage)."""
        return isinstance(self.language, QFormerTextConfig)

    @property
    def tokens_per_tile(self) -> int:
        """Tokens that one tile becomes."""
        return self.connector.tokens_per_tile(self.vision.num_patches)

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that have cross-attention."""
        return () if self.learns_from_pairs else self.fusion.cross_attention_layers(self.decoder.num_layers)

    @property
    def gated_feed_forward(self) -> GatedFeedForwardConfig | None:
        """The feed-forward layer behind each cross-attention, where there is any."""
        return self.fusion.feed_forward if isinstance(self.fusion, CrossAttentionConfig) else None

    @pydantic.model_validator(mode="after")
    def _layers_fit(self) -> "VLMConfig":
        _ = self.cross_attention_layers  # raises
        if self.learns_from_pairs and (self.connector.kind, self.fusion.kind) != ("qformer", "decoder_only"):
            raise ValueError(
                f"model.language.kind={self.language.kind!r}: is the text side of a Q-Former, and the model has "
                f"connector.kind={self.connector.kind!r} and fusion.kind={self.fusion.kind!r}. Set them to qformer and "
                "decoder_only."
            )
        return self


def model_vocab_size(config: LanguageConfig | QFormerTextConfig, tokenizer_vocab_size: int) -> int:
    """Tokens that a model for this tokenizer has.

    Raises:
        ValueError: the tokenizer has more tokens than the recipe's vocabulary.
    """
    if config.vocab_size is None:
        return tokenizer_vocab_size
    if config.vocab_size < tokenizer_vocab_size:
        raise ValueError(
            f"model.language.vocab_size={config.vocab_size}: the tokenizer has {tokenizer_vocab_size} tokens (image "
            "token included). Raise vocab_size, or leave it out to take the tokenizer's."
        )
    return config.vocab_size
