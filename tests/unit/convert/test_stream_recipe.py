"""What comes with the weights: the model's description, the vocabulary and the tokenizer."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
import yaml
from hf_folder import save
from published import VOCAB_SIZE, make_internvl
from test_stream_errors import changed, recipe_of

from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.config import load_recipe, merge
from megavlm.convert.folder import convert_folder
from megavlm.convert.from_hf import import_folder
from megavlm.convert.parts import ModelFile, ModelParts
from megavlm.convert.recipe_of.whole import nvlm_d_tree
from megavlm.models.config import VLMConfig

EXAMPLES = Path(__file__).parents[3] / "examples"
EMBEDDING = "language.embedding.word_embeddings.weight"

NVLM_D_72B: dict[str, Any] = {  # the values of the published config.json that say something of the model
    "architectures": ["NVLM_D"],
    "downsample_ratio": 0.5,
    "force_image_size": 448,
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_bias": True,
        "hidden_act": "silu",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "max_position_embeddings": 32768,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 3.0, "type": "dynamic"},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    "model_type": "NVLM_D",
    "ps_version": "v2",
    "select_layer": -1,
    "vision_config": {
        "hidden_act": "gelu",
        "hidden_size": 3200,
        "image_size": 448,
        "intermediate_size": 12800,
        "layer_norm_eps": 1e-06,
        "norm_type": "rms_norm",
        "num_attention_heads": 25,
        "num_channels": 3,
        "num_hidden_layers": 45,
        "patch_size": 14,
        "qk_normalization": True,
        "qkv_bias": False,
    },
}


def save_tokenizer(folder: Path, size: int, image_token: str | None = None) -> int | None:
    """Put a tokenizer of so many tokens into a folder; returns the image token's id if it has one."""
    words = {"<eos>": 0} | {f"word{number}": number for number in range(1, size)}
    if image_token is not None:
        words[image_token] = words.pop(f"word{size - 1}")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    special = [] if image_token is None else [image_token]
    full = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=special
    )
    full.save_pretrained(folder)
    return None if image_token is None else size - 1


def test_the_published_nvlm_d_is_the_example() -> None:
    example = yaml.safe_load((EXAMPLES / "nvlm" / "nvlm_d_72b.yaml").read_text(encoding="utf-8"))["model"]
    stated = nvlm_d_tree(NVLM_D_72B)
    described = VLMConfig.model_validate(merge(stated | {"fusion": {"kind": "decoder_only"}}, {}))
    expected = VLMConfig.model_validate(example).model_dump()
    expected["language"]["kv_channels"] = 128  # spelt out
    assert described.model_dump() == expected


def test_model_yaml_is_the_model(tmp_path: Path) -> None:
    save("internvl", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    described = load_recipe(tmp_path / "run" / "model.yaml", [], ModelFile).model.model_dump()
    expected = ModelParts.of(make_internvl().config).model_dump()
    expected["language"] |= {"kv_channels": 8, "make_vocab_size_divisible_by": 128}
    expected["connector"] |= {"ffn_hidden_size": 32}
    assert described == expected


def test_model_yaml_is_a_base_of_recipes(tmp_path: Path) -> None:
    save("internvl", tmp_path / "hf")
    save_tokenizer(tmp_path / "hf", VOCAB_SIZE, "<IMG_CONTEXT>")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    tree = recipe_of(changed()).model_dump(mode="json")
    rest = {name: tree[name] for name in ("data", "engine", "training", "checkpoint")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"base": "run/model.yaml", **rest}))
    recipe = load_recipe(tmp_path / "recipe.yaml", [], type(recipe_of(changed())))
    tokenizer = recipe.tokenizer.build()
    assert (tokenizer.vocab_size, tokenizer.image_token_id) == (VOCAB_SIZE, VOCAB_SIZE - 1)
    assert recipe.model.language.vocab_size == VOCAB_SIZE


def test_the_tokenizer_travels_along(tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    save_tokenizer(tmp_path / "hf", VOCAB_SIZE)
    convert_folder(tmp_path / "hf", tmp_path / "run")
    back = convert_folder(tmp_path / "run", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "num_rows", "warns"), [((), 50, True), (("model.language.vocab_size=51",), 51, False)]
)
def test_a_vocabulary_without_room_for_the_image_token_is_said(
    overrides: tuple[str, ...], num_rows: int, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save("llama", tmp_path / "hf")
    save_tokenizer(tmp_path / "hf", VOCAB_SIZE)
    with caplog.at_level(logging.INFO, logger="megavlm"):
        logging.getLogger("megavlm").addHandler(caplog.handler)
        checkpoint = convert_folder(tmp_path / "hf", tmp_path / "run", overrides)
        logging.getLogger("megavlm").removeHandler(caplog.handler)
    assert CheckpointWeights(checkpoint).template(EMBEDDING).shape[0] == num_rows
    assert ("the tokenizer has 51 tokens, image token included" in caplog.text) == warns
    assert ("1 of the 51 rows are new (the folder has 50)" in caplog.text) == (not warns)


def test_a_recipe_says_the_vocabulary_by_its_tokenizer(tmp_path: Path) -> None:
    save("internvl", tmp_path / "hf")
    save_tokenizer(tmp_path / "tokenizer", 60)
    model = changed(language__vocab_size=None)
    recipe = recipe_of(model)
    tokenizer = recipe.tokenizer.model_copy(update={"path": tmp_path / "tokenizer"})
    recipe = recipe.model_copy(update={"tokenizer": tokenizer})
    checkpoint = import_folder(tmp_path / "hf", tmp_path / "run", recipe)
    assert CheckpointWeights(checkpoint).template(EMBEDDING).shape[0] == 61  # with <image>
    save_tokenizer(tmp_path / "tokenizer", 40)
    with pytest.raises(ValueError, match=r"vocab_size=None: gives 41 tokens, and the folder's vocabulary has 50"):
        import_folder(tmp_path / "hf", tmp_path / "other", recipe)


def test_a_recipe_with_cross_attention_takes_a_language_model(tmp_path: Path) -> None:
    save("qwen2", tmp_path / "hf")
    model = changed()
    model["fusion"] = {"kind": "cross_attention"}
    checkpoint = import_folder(tmp_path / "hf", tmp_path / "run", recipe_of(model, ("cross_attention",)))
    assert {key.split(".")[0] for key in CheckpointWeights(checkpoint)} == {"language"}
    assert json.loads((checkpoint / "extra.json").read_text()) == {}
    assert yaml.safe_load((tmp_path / "run" / "model.yaml").read_text())["model"].keys() == {"language"}
