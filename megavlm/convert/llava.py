"""Weights of LLaVA and LLaVA-1.5 (CLIP or SigLIP, ``mlp`` connector, Llama, Mistral or Qwen2), in both namings.

``transformers``' LlavaForConditionalGeneration, spelt as its published folders are, and the authors' release.
"""

from megavlm.convert import clip, llama, siglip
from megavlm.convert.rules import Rule, under
from megavlm.convert.weight_map import WeightMap
from megavlm.models.config import VLMConfig
from megavlm.models.connectors.mlp import MLPConnectorConfig
from megavlm.models.vision.clip import ClipConfig
from megavlm.models.vision.siglip import SiglipConfig

_CONNECTOR = (
    Rule("linear_fc1.{leaf}", ("linear_1.{leaf}",)),
    Rule("linear_fc2.{leaf}", ("linear_2.{leaf}",)),
)
_ORIGINAL_CONNECTORS = {
    1: (Rule("linear_fc1.{leaf}", ("{leaf}",)),),
    2: (  # a torch.nn.Sequential: linear, GELU, linear
        Rule("linear_fc1.{leaf}", ("0.{leaf}",)),
        Rule("linear_fc2.{leaf}", ("2.{leaf}",)),
    ),
}
"""By number of layers."""
_TOWER = "vision_tower.vision_model."
_ORIGINAL_TOWER = "model.vision_tower.vision_tower.vision_model."


def weight_map(config: VLMConfig) -> WeightMap:
    """Return the map of LlavaForConditionalGeneration; its newer spellings and a state dict in memory fit too.

    Raises:
        ValueError: the recipe's vision encoder is neither CLIP nor SigLIP.
    """
    encoder_rules, unused, idle_norms = _tower(config)
    return WeightMap(
        rules=under(encoder_rules, ours="vision.", theirs=_TOWER)
        + under(_CONNECTOR, ours="connector.", theirs="multi_modal_projector.")
        + under(llama.decoder_rules(config.decoder), ours="language.", theirs="language_model."),
        unused=llama.UNUSED + tuple(_TOWER + pattern for pattern in unused),
        tied=(("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),),
        spellings=(
            ("model.vision_tower.vision_model.", _TOWER),
            ("model.vision_tower.", _TOWER),
            ("vision_tower.", _TOWER),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
        ),
        idle_norms=idle_norms,
    )


def original_weight_map(config: VLMConfig) -> WeightMap:
    """Return the map of the authors' release (LlavaLlamaForCausalLM and others), with its vision tower inside.

    Raises:
        ValueError: the recipe's vision encoder is neither CLIP nor SigLIP.
    """
    encoder_rules, unused, _ = _tower(config)
    assert isinstance(config.connector, MLPConnectorConfig), "as config.json says, with which it was compared"
    connector = _ORIGINAL_CONNECTORS[config.connector.num_layers]
    return WeightMap(
        rules=under(encoder_rules, ours="vision.", theirs=_ORIGINAL_TOWER)
        + under(connector, ours="connector.", theirs="model.mm_projector.")
        + under(llama.decoder_rules(config.decoder), ours="language.", theirs=""),
        unused=llama.UNUSED + tuple(_ORIGINAL_TOWER + pattern for pattern in unused),
        tied=(("lm_head.weight", "model.embed_tokens.weight"),),
        elsewhere=(
            (
                _ORIGINAL_TOWER,
                "The release leaves its vision tower (mm_vision_tower) to another folder. Convert the model's version "
                "for transformers (llava-hf), which has all parts, or save it with its tower.",
            ),
        ),
    )


def _tower(config: VLMConfig) -> tuple[tuple[Rule, ...], tuple[str, ...], tuple[tuple[str, int], ...]]:
    """Table, unused tensors and idle norms of the vision encoder."""
    vision = config.vision
    if isinstance(vision, ClipConfig):
        return clip.encoder_rules(vision), clip.unused(vision), clip.idle_norms(vision)
    if isinstance(vision, SiglipConfig):
        return siglip.encoder_rules(vision), siglip.unused(vision), siglip.idle_norms(vision)
    raise ValueError(f"model.vision.kind={vision.kind!r}: LLaVA's is clip or siglip. Set kind to one of them.")
