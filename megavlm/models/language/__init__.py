"""The language model: its config, its layers, and one pipeline stage of it."""

from megavlm.models.language.alone import LanguageAlone
from megavlm.models.language.config import LanguageConfig, decoder_layer_specs
from megavlm.models.language.model import LanguageModel

__all__ = ["LanguageAlone", "LanguageConfig", "LanguageModel", "decoder_layer_specs"]
