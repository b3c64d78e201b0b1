"""Small published models with random weights, each beside the recipe part and the weight map that describe it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from parity import randomize
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megavlm.convert import internvl, llama, llava, qwen2
from megavlm.convert.weight_map import WeightMap
from megavlm.models.config import VLMConfig
from megavlm.models.connectors.mlp import MLPConnectorConfig
from megavlm.models.fusion.decoder_only import DecoderOnlyConfig
from megavlm.models.language import LanguageConfig
from megavlm.models.vision.clip import ClipConfig
from megavlm.models.vision.internvit import InternViTConfig
from megavlm.models.vision.siglip import SiglipConfig

VOCAB_SIZE = 50
IMAGE_TOKEN = 49
TEXT = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class Published:
    """A model of transformers, and what it is to us."""

    model: torch.nn.Module
    config: Any
    weight_map: WeightMap


def language_config(**changes: Any) -> LanguageConfig:
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": VOCAB_SIZE,
        "make_vocab_size_divisible_by": 16,
    }
    return LanguageConfig(**{**fields, **changes})


def make_llama() -> Published:
    config = language_config()
    model = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=False))
    return _randomized(model, config, llama.weight_map(config))


def make_llama_tied() -> Published:
    config = language_config(share_embeddings_and_output_weights=True, rotary_base=500000)
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    model = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True, rope_parameters=rope))
    return _randomized(model, config, llama.weight_map(config))


def make_llama_3_1() -> Published:
    config = language_config(rotary_base=500000, rope_scaling_factor=8.0)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=False, rope_parameters=rope))
    return _randomized(model, config, llama.weight_map(config))


def make_qwen2() -> Published:
    config = language_config(add_qkv_bias=True)
    model = Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=False))
    return _randomized(model, config, qwen2.weight_map(config))


def make_qwen2_tied() -> Published:
    config = language_config(add_qkv_bias=True, share_embeddings_and_output_weights=True)
    model = Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=True))
    return _randomized(model, config, qwen2.weight_map(config))


def make_internvl(*, tied: bool = False) -> Published:
    vision = {
        "image_size": 56,
        "patch_size": 14,
        "num_hidden_layers": 2,
        "hidden_size": 40,
        "intermediate_size": 64,
        "num_attention_heads": 5,
        "norm_type": "rms_norm",
        "use_qk_norm": True,
    }
    theirs = InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **TEXT, "tie_word_embeddings": tied},
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    theirs._attn_implementation = "eager"
    config = VLMConfig(
        vision=InternViTConfig(
            image_size=56,
            patch_size=14,
            num_layers=2,
            hidden_size=40,
            ffn_hidden_size=64,
            num_attention_heads=5,
            normalization="RMSNorm",
            qk_layernorm=True,
            add_qkv_bias=False,
        ),
        connector=MLPConnectorConfig(bias=True),
        fusion=DecoderOnlyConfig(),
        language=language_config(add_qkv_bias=True, share_embeddings_and_output_weights=tied),
    )
    return _randomized(InternVLForConditionalGeneration(theirs), config, internvl.weight_map(config))


def make_internvl_tied() -> Published:
    return make_internvl(tied=True)


def make_llava() -> Published:
    """With the class token in the tower only, Llama, and features of the last layer but one."""
    tower = _TOWER | {"model_type": "clip_vision_model", "image_size": 28}
    theirs = LlavaConfig(
        vision_config=tower,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        vision_feature_layer=-2,
    )
    vision = ClipConfig(**_OUR_TOWER, image_size=28, select_layer=-2)
    return _make_llava(theirs, vision, language_config())


def make_llava_siglip() -> Published:
    """A tile of no whole number of patches, features of the last layer before the norm, Qwen2, tied."""
    tower = _TOWER | {"model_type": "siglip_vision_model", "image_size": 39}
    theirs = LlavaConfig(
        vision_config=tower,
        text_config={"model_type": "qwen2", **TEXT, "tie_word_embeddings": True},
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        multimodal_projector_bias=False,
        tie_word_embeddings=True,
    )
    vision = SiglipConfig(**_OUR_TOWER, image_size=39, post_layernorm=False)
    language = language_config(add_qkv_bias=True, share_embeddings_and_output_weights=True)
    return _make_llava(theirs, vision, language)


_TOWER: dict[str, Any] = {
    "patch_size": 14,
    "num_hidden_layers": 3,
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_attention_heads": 5,
}
_OUR_TOWER: dict[str, Any] = {
    "patch_size": 14,
    "num_layers": 3,
    "hidden_size": 40,
    "ffn_hidden_size": 64,
    "num_attention_heads": 5,
}


def _make_llava(theirs: LlavaConfig, vision: Any, language: LanguageConfig) -> Published:
    theirs._attn_implementation = "eager"
    connector = MLPConnectorConfig(bias=theirs.multimodal_projector_bias, layernorm=False, pixel_shuffle_ratio=1.0)
    config = VLMConfig(vision=vision, connector=connector, fusion=DecoderOnlyConfig(), language=language)
    return _randomized(LlavaForConditionalGeneration(theirs), config, llava.weight_map(config))


LANGUAGE_MODELS: dict[str, Callable[[], Published]] = {
    "llama": make_llama,
    "llama_tied": make_llama_tied,
    "llama_3_1": make_llama_3_1,
    "qwen2": make_qwen2,
    "qwen2_tied": make_qwen2_tied,
}
WHOLE_MODELS: dict[str, Callable[[], Published]] = {
    "internvl": make_internvl,
    "internvl_tied": make_internvl_tied,
    "llava": make_llava,
    "llava_siglip": make_llava_siglip,
}


def _randomized(model: torch.nn.Module, config: Any, weight_map: WeightMap) -> Published:
    randomize(model)
    return Published(model, config, weight_map)
