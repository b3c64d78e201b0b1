"""What a recipe can say about the Q-Former's text side."""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config import Config
from megavlm.models.backend import Backend
from megavlm.models.blip2.model import QFormerText, TextSizes
from megavlm.models.connectors.layers import replicated_config
from megavlm.models.connectors.qformer import QFormer, QFormerConfig


class QFormerTextConfig(Config):
    """The Q-Former's text side, in the place of a language model. The defaults are BLIP-2's.

    Widths and layers are the connector's.
    """

    kind: Literal["qformer_text"] = "qformer_text"
    vocab_size: pydantic.PositiveInt | None = None
    """Tokens of the vocabulary, the image token included; None: as many as the tokenizer has."""
    max_position_embeddings: int = pydantic.Field(512, ge=2)
    """Learned positions: a caption may have one token less, because a start token stands before it."""
    contrast_size: pydantic.PositiveInt = 256
    """Width in which images and captions are compared."""
    temperature: pydantic.PositiveFloat = 0.07
    """What similarities are divided by when the run begins; learned."""
    label_smoothing: float = pydantic.Field(0.1, ge=0.0, lt=1.0)
    """Of the contrast and of the captions' tokens."""

    # What the rest of the project asks of any language model: this one is whole on every rank and has no experts.
    @property
    def moe(self) -> None:
        """Experts: none."""

    @property
    def lora(self) -> None:
        """Adapters: none."""

    @property
    def num_moe_experts(self) -> None:
        """Experts of a layer: none."""

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Tied inside the module, which is on one stage; nothing for megatron-core to reduce."""
        return False

    def transformer_config(self, megatron_settings: Mapping[str, Any], qformer: QFormerConfig) -> TransformerConfig:
        """Return megatron-core's config of the text side.

        Args:
            megatron_settings: TransformerConfig arguments that come from the layout and the precision.
            qformer: the connector's, whose fresh weights it has.
        """
        return replicated_config(qformer, megatron_settings, qformer.layernorm_epsilon)

    def build(
        self,
        qformer: QFormerConfig,
        input_size: int,
        megatron_settings: Mapping[str, Any],
        backend: Backend,
        *,
        vocab_size: int,
        image_token_id: int,
        seed: int,
    ) -> tuple[QFormer, QFormerText]:
        """Make the connector, with feed-forward layers for text and nothing behind it, and the text side.

        Args:
            qformer: the connector's config.
            input_size: width of the image features.
            megatron_settings: TransformerConfig arguments that come from the layout and the precision.
            backend: where the norms come from.
            vocab_size: tokens of the tokenizer, image token included.
            image_token_id: the placeholder of image features.
            seed: of the choice of negatives.
        """
        config = self.transformer_config(megatron_settings, qformer)
        sizes = TextSizes(
            width=qformer.hidden_size,
            vocab_size=vocab_size,
            max_positions=self.max_position_embeddings,
            contrast_size=self.contrast_size,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
        )
        connector = QFormer(qformer, config, input_size, None, backend, has_text=True)
        text = QFormerText(sizes, config, backend, image_token_id=image_token_id, seed=seed)
        return connector, text
