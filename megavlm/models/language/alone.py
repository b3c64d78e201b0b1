"""A language model without the rest of a vision-language model."""

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.batch import Batch
from megavlm.models.backend import BACKENDS
from megavlm.models.language.config import LanguageConfig, decoder_layer_specs
from megavlm.models.language.model import LanguageModel


class LanguageAlone(MegatronModule):
    """A whole language model under the keys that it has in a vision-language one; reads texts."""

    def __init__(self, config: LanguageConfig, megatron_settings: Mapping[str, Any], vocab_size: int) -> None:
        """Build it of the torch backend's layers; its weights hold nothing yet.

        Args:
            config: shape of the decoder.
            megatron_settings: TransformerConfig arguments that come from the layout and the precision.
            vocab_size: tokens of the vocabulary, padding not counted.
        """
        super().__init__(config.transformer_config(megatron_settings))
        self.model_type = ModelType.encoder_or_decoder
        backend = BACKENDS["torch"]
        self.language = LanguageModel(
            config,
            self.config,
            decoder_layer_specs(config, self.config, backend),
            backend,
            vocab_size=vocab_size,
            pre_process=True,
            post_process=True,
        )

    def set_input_tensor(self, input_tensor: object) -> None:
        """Take nothing: there is no stage before (called by megatron-core's schedules)."""

    def forward(self, batch: Batch, wanted_logits: Tensor, cache: None = None) -> Tensor:
        """Return logits ``[M, V]`` where ``wanted_logits`` ``[N, S]`` is not 0."""
        states = self.language.embed(batch.tokens, batch.position_ids)
        return self.language.logits(self.language(states, batch.position_ids, None), wanted_logits)
