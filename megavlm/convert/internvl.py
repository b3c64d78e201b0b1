"""Weights of whole InternVL models (InternViT, ``mlp`` connector, Llama or Qwen2), in both of their namings.

``transformers``' InternVLForConditionalGeneration, and the original release (``InternVLChatModel``), whose names
NVLM-D-72B shares.
"""

from megavlm.convert import internvit, llama
from megavlm.convert.rules import Rule, under
from megavlm.convert.weight_map import WeightMap
from megavlm.models.config import VLMConfig
from megavlm.models.vision.internvit import InternViTConfig

_CONNECTOR = (
    Rule("layernorm.{leaf}", ("layer_norm.{leaf}",)),
    Rule("linear_fc1.{leaf}", ("linear_1.{leaf}",)),
    Rule("linear_fc2.{leaf}", ("linear_2.{leaf}",)),
)
_ORIGINAL_CONNECTOR = (  # a torch.nn.Sequential: norm, linear, GELU, linear
    Rule("layernorm.{leaf}", ("0.{leaf}",)),
    Rule("linear_fc1.{leaf}", ("1.{leaf}",)),
    Rule("linear_fc2.{leaf}", ("3.{leaf}",)),
)


def weight_map(config: VLMConfig) -> WeightMap:
    """Return the map of InternVLForConditionalGeneration, spelt as its files are; a state dict in memory fits too.

    Raises:
        ValueError: the recipe's vision encoder is not InternViT.
    """
    vision = _internvit_of(config)
    return WeightMap(
        rules=under(internvit.encoder_rules(vision), ours="vision.", theirs="vision_tower.")
        + under(_CONNECTOR, ours="connector.", theirs="multi_modal_projector.")
        + under(llama.decoder_rules(config.decoder), ours="language.", theirs="language_model."),
        unused=llama.UNUSED + internvit.unused(vision, "vision_tower.encoder.layer."),
        tied=(("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),),
        spellings=(
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
        ),
    )


def original_weight_map(config: VLMConfig) -> WeightMap:
    """Return the map of the original release and of NVLM-D-72B.

    Raises:
        ValueError: the recipe's vision encoder is not InternViT.
    """
    vision = _internvit_of(config)
    return WeightMap(
        rules=under(internvit.original_encoder_rules(vision), ours="vision.", theirs="vision_model.")
        + under(_ORIGINAL_CONNECTOR, ours="connector.", theirs="mlp1.")
        + under(llama.decoder_rules(config.decoder), ours="language.", theirs="language_model."),
        unused=llama.UNUSED + internvit.unused(vision, "vision_model.encoder.layers."),
        tied=(("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),),
    )


def _internvit_of(config: VLMConfig) -> InternViTConfig:
    if not isinstance(config.vision, InternViTConfig):
        raise ValueError(f"model.vision.kind={config.vision.kind!r}: InternVL's is internvit. Set kind: internvit.")
    return config.vision
