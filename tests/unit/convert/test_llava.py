"""LLaVA: its spellings, the original release, every layout of the engine, and what it has no place for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from hf_folder import as_published, assert_same_tensors, edit_config, edit_tensors, save, tensors_of
from parity import relative_difference
from published import IMAGE_TOKEN, TEXT, VOCAB_SIZE, make_llava
from safetensors.torch import save_file
from test_model_parity import LENGTH, ROWS, make_batch
from torch import Tensor
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from megavlm.batch import Batch
from megavlm.checkpoint import load_checkpoint
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.config import load_recipe
from megavlm.convert.config_of import architecture_of
from megavlm.convert.folder import convert_folder
from megavlm.convert.parts import ModelFile, ModelParts
from megavlm.convert.receipt import make_receipt
from megavlm.convert.recipe_of import llava as recipe_of_llava
from megavlm.convert.recipe_of.llava import llava_tree, original_llava_tree
from megavlm.engines import MegatronEngine, MegatronEngineConfig
from megavlm.models.config import VLMConfig
from megavlm.models.initialization import initialize_weights
from megavlm.models.vlm import VLM

LLAVA_1_5_7B: dict[str, Any] = {  # llava-hf/llava-1.5-7b-hf, what its config.json says of the model
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
ORIGINAL_1_5_7B: dict[str, Any] = {  # liuhaotian/llava-v1.5-7b
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
SMALL_TOWER = {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 5}
SMALL_TOWER |= {"patch_size": 14, "image_size": 28}


def test_both_configurations_of_the_published_model_say_the_same() -> None:
    ours, original = llava_tree(LLAVA_1_5_7B), original_llava_tree(ORIGINAL_1_5_7B)
    assert ours["language"].pop("vocab_size") == 32064
    assert original["language"].pop("vocab_size") == 32000
    assert ours == original
    model = VLMConfig.model_validate({**ours, "fusion": {"kind": "decoder_only"}})
    assert (model.tokens_per_tile, model.vision.num_layers_built, model.language.num_layers) == (576, 23, 32)
    assert architecture_of(ModelParts.of(model)) == "LlavaForConditionalGeneration"


SPELLINGS = {
    "before_4_52": ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", ""),
    "in_memory": ("model.language_model.", "lm_head.", "model.vision_tower.", "model."),
    "in_memory_4_52": ("model.language_model.", "lm_head.", "model.vision_tower.vision_model.", "model."),
    "as_saved_by_5": ("language_model.model.", "language_model.lm_head.", "vision_tower.", ""),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_model(spelling: str, tmp_path: Path) -> None:
    text, head, tower, connector = SPELLINGS[spelling]
    before = {"language_model.model.": text, "language_model.lm_head.": head, "vision_tower.": tower}
    before |= {"multi_modal_projector.": connector + "multi_modal_projector."}

    def respell(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            prefix = next(prefix for prefix in before if name.startswith(prefix))
            tensors[before[prefix] + name.removeprefix(prefix)] = tensors.pop(name)

    save("llava", tmp_path / "hf")
    expected = as_published("llava", tensors_of(tmp_path / "hf"))
    edit_tensors(tmp_path / "hf", respell)
    convert_folder(tmp_path / "hf", tmp_path / "run")
    assert_same_tensors(tensors_of(convert_folder(tmp_path / "run", tmp_path / "back")), expected)


def logits_of(checkpoint: Path, model: VLMConfig, tp: int, pp: int, batch: Batch, is_rough: bool) -> Tensor:
    """On ranks: logits ``[N, S, V]`` of a checkpoint under a layout."""
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    engine = MegatronEngine(MegatronEngineConfig(**layout, precision="bf16" if is_rough else "fp32"))
    engine.start()
    settings = engine.config.megatron_settings()
    names = {"vocab_size": VOCAB_SIZE, "image_token_id": IMAGE_TOKEN}
    chunks = [
        VLM(model, settings, **names, pre_process=stage.pre_process, post_process=stage.post_process)
        for stage in engine.stages()
    ]
    initialize_weights(chunks, seed=1)
    engine.wrap(chunks, training=False)
    load_checkpoint(checkpoint, engine, with_optimizer=False)
    return engine.logits(batch, torch.ones_like(batch.tokens), VOCAB_SIZE).view(ROWS, LENGTH, VOCAB_SIZE)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("family", ["llava", "llava_siglip"])
def test_every_layout_gives_the_logits_of_transformers(family: str, tp: int, pp: int, tmp_path: Path) -> None:
    published = save(family, tmp_path / "hf")
    checkpoint = convert_folder(tmp_path / "hf", tmp_path / "run")
    model = load_recipe(tmp_path / "run" / "model.yaml", [], ModelFile).model.whole()
    batch = make_batch(torch.Generator().manual_seed(5), model.vision.image_size)
    with torch.no_grad():
        expected = published(input_ids=batch.tokens, pixel_values=batch.tiles).logits
    for logits in run_ranks(logits_of, tp * pp, checkpoint, model, tp, pp, batch, False):
        # Worst seen: 4.9e-7.
        assert relative_difference(logits, expected) < 1e-5


@pytest.mark.parametrize("family", ["llava", "llava_siglip"])
def test_bfloat16_comes_back_bit_by_bit_and_computes_near(family: str, tmp_path: Path) -> None:
    published = save(family, tmp_path / "hf")
    edit_tensors(tmp_path / "hf", lambda held: held.update({name: t.bfloat16() for name, t in held.items()}))
    edit_config(tmp_path / "hf", dtype="bfloat16")
    checkpoint = convert_folder(tmp_path / "hf", tmp_path / "run")
    back = convert_folder(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tensors_of(back), as_published(family, tensors_of(tmp_path / "hf")))
    model = load_recipe(tmp_path / "run" / "model.yaml", [], ModelFile).model.whole()
    batch = make_batch(torch.Generator().manual_seed(5), model.vision.image_size)
    with torch.no_grad():
        expected = published(input_ids=batch.tokens, pixel_values=batch.tiles).logits
    (logits,) = run_ranks(logits_of, 1, checkpoint, model, 1, 1, batch, True)
    # Worst seen: 0.9 % of the largest logit.
    assert relative_difference(logits.float(), expected) < 0.05


def original_folder(folder: Path, *, num_layers: int, with_tower: bool = True) -> CLIPVisionModel:
    """What the authors' code would save: its names, the tower inside or not. Returns the tower."""
    torch.manual_seed(3)
    text = {name: value for name, value in TEXT.items() if name != "attn_implementation"}
    language = LlamaForCausalLM(LlamaConfig(**text, tie_word_embeddings=False))
    tower = CLIPVisionModel(CLIPVisionConfig(**SMALL_TOWER))
    tensors = dict(language.state_dict())
    widths = [(32, 40), (32, 32)][:num_layers]
    for number, shape in enumerate(widths):
        name = "model.mm_projector." if num_layers == 1 else f"model.mm_projector.{2 * number}."
        tensors |= {name + "weight": torch.randn(shape) / 6, name + "bias": torch.randn(shape[0])}
    if with_tower:
        prefix = "model.vision_tower.vision_tower.vision_model."
        tensors |= {prefix + name: tensor for name, tensor in tower.state_dict().items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = language.config.to_dict() | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": "somewhere/small-tower",
        "mm_hidden_size": 40,
        "mm_projector_type": "linear" if num_layers == 1 else "mlp2x_gelu",
        "mm_vision_select_layer": -2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return tower


@pytest.fixture
def _small_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipe_of_llava._NAMED_TOWERS, "small-tower", ("clip_vision_model", SMALL_TOWER))


@pytest.mark.usefixtures("_small_tower")
def test_the_authors_release_becomes_the_model_of_transformers(tmp_path: Path) -> None:
    tower = original_folder(tmp_path / "original", num_layers=2)
    convert_folder(tmp_path / "original", tmp_path / "run")
    make_receipt(tmp_path / "original", tmp_path / "run").require()
    back = convert_folder(tmp_path / "run", tmp_path / "back")
    loaded, info = AutoModelForImageTextToText.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_tensors(loaded.model.vision_tower.state_dict(), tower.state_dict())
    original = tensors_of(tmp_path / "original")
    language = {f"language_model.{name}" if name.startswith("lm") else name: t for name, t in original.items()}
    assert torch.equal(loaded.lm_head.weight, language["language_model.lm_head.weight"])
    assert torch.equal(loaded.model.multi_modal_projector.linear_2.bias, original["model.mm_projector.2.bias"])
    assert loaded.config.vision_feature_layer == -2
    again = convert_folder(back, tmp_path / "again")
    assert_same_weights(CheckpointWeights(again), CheckpointWeights(tmp_path / "run" / "release"))


def assert_same_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert_same_tensors({key: found[key] for key in found}, {key: expected[key] for key in expected})


@pytest.mark.usefixtures("_small_tower")
def test_llava_1_0_has_one_layer_and_no_class_of_its_own(tmp_path: Path) -> None:
    original_folder(tmp_path / "original", num_layers=1)
    checkpoint = convert_folder(tmp_path / "original", tmp_path / "run")
    assert CheckpointWeights(checkpoint).template("connector.linear_fc1.weight").shape == (32, 40)
    with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration: has no place for .*num_layers=1 \(only 2\)"):
        convert_folder(tmp_path / "run", tmp_path / "back", architecture="LlavaForConditionalGeneration")


@pytest.mark.usefixtures("_small_tower")
def test_a_release_without_its_tower_says_where_it_is(tmp_path: Path) -> None:
    original_folder(tmp_path / "original", num_layers=2, with_tower=False)
    with pytest.raises(ValueError, match=r"lack model\.vision_tower.*leaves its vision tower .* to another folder"):
        convert_folder(tmp_path / "original", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, r"mm_projector_type='mlp3x_gelu' \(supported: 'linear', 'mlp2x_gelu'\)"),
        ({"mm_vision_tower": "a/eva"}, r"mm_vision_tower='eva' \(supported: clip-vit-large-patch14, "),
        ({"mm_hidden_size": 768}, r"mm_hidden_size=768 \(supported: 1024, the width of clip-vit-large-patch14-336\)"),
        ({"mm_vision_select_layer": 23}, r"mm_vision_select_layer=23 \(supported: one number below 0\)"),
        ({"mm_vision_select_layer": -25}, r"mm_vision_select_layer=-25 \(supported: -1 to -24\)"),
        ({"mm_patch_merge_type": "spatial_unpad"}, r"mm_patch_merge_type='spatial_unpad' \(supported: 'flat'\)"),
    ],
)
def test_releases_of_other_models_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        original_llava_tree({**ORIGINAL_1_5_7B, **changes})


def changed(part: str, **fields: Any) -> ModelParts:
    parts = ModelParts.of(make_llava().config)
    return parts.model_copy(update={part: getattr(parts, part).model_copy(update=fields)})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (changed("connector", layernorm=True), r"model\.connector\.layernorm=True \(only False\)"),
        (changed("connector", pixel_shuffle_ratio=0.5), r"pixel_shuffle_ratio=0\.5 \(only 1\.0\)"),
        (changed("connector", ffn_hidden_size=48), r"ffn_hidden_size=48 \(only model\.language\.hidden_size=32\)"),
        (changed("connector", num_layers=1, layernorm=True), r"num_layers=1 \(only 2\); .*layernorm=True"),
    ],
)
def test_what_llava_has_no_place_for_is_named(parts: ModelParts, message: str) -> None:
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration: has no place for .*" + message):
        architecture_of(parts, "LlavaForConditionalGeneration")


def test_a_recipe_with_another_tower_is_refused() -> None:
    from_siglip = {"kind": "siglip", **SMALL_TOWER}
    del from_siglip["num_hidden_layers"], from_siglip["intermediate_size"]
    parts = ModelParts.of(make_llava().config).model_dump()
    parts["vision"] = from_siglip | {"num_layers": 3, "ffn_hidden_size": 64}
    with pytest.raises(ValueError, match=r"model\.vision\.post_layernorm=True \(only false\)"):
        architecture_of(ModelParts(**parts), "LlavaForConditionalGeneration")
    with pytest.raises(ValueError, match=r"model\.vision\.kind='clip' \(only internvit\)"):
        architecture_of(ModelParts.of(make_llava().config), "InternVLForConditionalGeneration")
