"""Weight maps of every family: nothing lost either way, every pipeline layout, every mismatch named."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from harness import RankError, run_ranks
from megatron.core import parallel_state
from parity import Holder, read_weights, start
from published import (
    IMAGE_TOKEN,
    LANGUAGE_MODELS,
    VOCAB_SIZE,
    WHOLE_MODELS,
    Published,
    language_config,
    make_internvl,
    make_llama,
    make_llama_tied,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from megavlm.convert import clip, internvit, internvl, llama, qwen2
from megavlm.convert.weight_map import WeightMap, load_weights, to_ours, to_theirs
from megavlm.models.backend import BACKENDS
from megavlm.models.config import VLMConfig
from megavlm.models.language import LanguageConfig, LanguageModel, decoder_layer_specs
from megavlm.models.vision.clip import ClipConfig
from megavlm.models.vision.internvit import InternViTConfig
from megavlm.models.vlm import VLM


def weights_of(published: Published) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in published.model.state_dict().items()}


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", [*LANGUAGE_MODELS, *WHOLE_MODELS])
def test_files_survive_there_and_back(family: str, tmp_path: Path) -> None:
    published = {**LANGUAGE_MODELS, **WHOLE_MODELS}[family]()
    published.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert_same_tensors(
        to_theirs(published.weight_map, to_ours(published.weight_map, tensors)), used(published, tensors)
    )


def used(published: Published, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What our model has a use for, spelt as the map's rules are."""
    table = published.weight_map
    spelt = {table.in_table_spelling(name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in spelt.items() if not table.is_unused(name)}


@pytest.mark.parametrize("family", WHOLE_MODELS)
def test_a_state_dict_in_memory_is_spelt_otherwise_and_is_the_same(family: str, tmp_path: Path) -> None:
    published = WHOLE_MODELS[family]()
    published.model.save_pretrained(tmp_path)
    from_files = to_ours(published.weight_map, load_file(tmp_path / "model.safetensors"))
    from_memory = to_ours(published.weight_map, weights_of(published))
    is_tied = published.config.language.share_embeddings_and_output_weights
    repeated = {"language.output_layer.weight"} if is_tied else set()
    assert from_memory.keys() - from_files.keys() == repeated
    assert_same_tensors({key: from_memory[key] for key in from_files}, from_files)


def test_clip_takes_the_vision_tower_up_to_the_selected_layer(tmp_path: Path) -> None:
    tower = {"hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 40}
    both = CLIPModel(CLIPConfig(vision_config={**tower, "image_size": 28, "patch_size": 14}, text_config=tower))
    both.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = ClipConfig(
        image_size=28,
        patch_size=14,
        num_layers=3,
        hidden_size=20,
        ffn_hidden_size=40,
        num_attention_heads=5,
        select_layer=-2,
    )
    table = clip.weight_map(config)
    back = to_theirs(table, to_ours(table, tensors))
    assert_same_tensors(back, {name: tensors[name] for name in back})
    kept_out = {name.removeprefix("vision_model.").rsplit(".", 1)[0] for name in tensors.keys() - back.keys()}
    assert {name for name in kept_out if not name.startswith("text_")} == {
        "logit_scale",
        "visual_projection",
        "post_layernorm",
        *(f"encoder.layers.2.{name}" for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")),
        *(f"encoder.layers.2.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    }


def as_original_release(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the files of a transformers InternVL to what OpenGVLab's release would hold."""
    names = {
        "vision_tower.": "vision_model.",
        "encoder.layer.": "encoder.layers.",
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_1": "ls1",
        "lambda_2": "ls2",
        "attention.projection_layer": "attn.proj",
        "attention.": "attn.",
        "multi_modal_projector.layer_norm": "mlp1.0",
        "multi_modal_projector.linear_1": "mlp1.1",
        "multi_modal_projector.linear_2": "mlp1.3",
    }
    original: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("vision_tower") and any(f"{part}_proj" in name for part in "kv"):
            continue
        if name.startswith("vision_tower") and "q_proj" in name:
            tensor = torch.cat([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("q_proj", "qkv")
        for theirs, originally in names.items():
            name = name if name.startswith("language_model") else name.replace(theirs, originally)
        original[name] = tensor
    return original


def test_both_namings_of_internvl_hold_the_same_model(tmp_path: Path) -> None:
    published = make_internvl()
    published.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    original = as_original_release(tensors)
    original_map = internvl.original_weight_map(published.config)
    assert_same_tensors(to_ours(original_map, original), to_ours(published.weight_map, tensors))
    assert_same_tensors(to_theirs(original_map, to_ours(original_map, original)), original)
    encoder = {name.removeprefix("vision_model."): tensor for name, tensor in original.items() if "vision" in name}
    alone = to_ours(internvit.original_weight_map(published.config.vision), encoder)
    assert alone
    assert all(torch.equal(alone[key], to_ours(original_map, original)[key]) for key in alone)


def fill_stage(
    tp: int, pp: int, config: VLMConfig, table: WeightMap, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """On ranks: fill one pipeline stage of a whole model. Returns all ranks' tensors under published names."""
    settings = {**start(tp, pp), "variable_seq_lengths": pp > 1, "moe_token_dispatcher_type": "alltoall"}
    stage = VLM(
        config,
        settings,
        vocab_size=VOCAB_SIZE,
        image_token_id=IMAGE_TOKEN,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    for parameter in stage.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    load_weights([stage], table, weights)
    return to_theirs(table, read_weights(stage))


LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("family", WHOLE_MODELS)
def test_every_layout_is_filled_whole(family: str, tp: int, pp: int, tmp_path: Path) -> None:
    published = WHOLE_MODELS[family]()
    published.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for found in run_ranks(fill_stage, tp * pp, tp, pp, published.config, published.weight_map, tensors):
        assert_same_tensors(found, used(published, tensors))


@pytest.mark.parametrize("pp", [1, 2])
def test_what_does_not_fit_is_an_error_on_every_rank(pp: int) -> None:
    published = make_internvl()
    good = weights_of(published)
    lm_norm, vision_bias = (
        "model.language_model.norm.weight",
        "model.vision_tower.embeddings.patch_embeddings.projection.bias",
    )
    cases: list[tuple[dict[str, Tensor], str]] = [
        (
            {**good, "model.language_model.layers.0.self_attn.o_proj.bias": torch.zeros(32)},
            r"weights: 1 of the given tensors have no place in the model: model\.language_model\.layers\.0\.self_attn",
        ),
        (
            {name: tensor for name, tensor in good.items() if name != vision_bias},
            r"vision\.embedding\.bias: the given weights lack vision_tower\.embeddings\.patch_embeddings\.projection",
        ),
        (
            {**good, lm_norm: torch.ones(31)},
            r"language\.decoder\.final_layernorm\.weight: the given tensor has shape \(31,\), the model's has \(32,\)",
        ),
    ]
    for weights, message in cases:
        for errors in run_ranks(_errors_of_stage, pp, pp, published.config, published.weight_map, weights):
            with pytest.raises(ValueError, match=message):
                raise ValueError(errors)


def _errors_of_stage(pp: int, config: VLMConfig, table: WeightMap, weights: Mapping[str, Tensor]) -> str:
    try:
        fill_stage(1, pp, config, table, weights)
    except ValueError as error:
        return str(error)
    return "no error"


def fill_language(config: LanguageConfig, table: WeightMap, weights: Mapping[str, Tensor]) -> None:
    """On one rank: fill a decoder."""
    backend, transformer_config = BACKENDS["torch"], config.transformer_config(start(1))
    language = LanguageModel(
        config,
        transformer_config,
        decoder_layer_specs(config, transformer_config, backend),
        backend,
        vocab_size=VOCAB_SIZE,
        pre_process=True,
        post_process=True,
    )
    load_weights([Holder("language", language)], table, weights)


def test_a_missing_output_layer_says_that_weights_may_be_tied() -> None:
    weights = weights_of(make_llama_tied())
    del weights["lm_head.weight"]  # as its files are
    config = language_config()
    message = (
        r"output_layer\.weight: the given weights lack lm_head\.weight\. .*share_embeddings_and_output_weights=true"
    )
    with pytest.raises(RankError, match=message):
        run_ranks(fill_language, 1, config, llama.weight_map(config), weights)


def test_a_copy_that_is_not_tied_is_a_leftover() -> None:
    published = make_llama()
    weights = weights_of(published)
    same = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    config = language_config(share_embeddings_and_output_weights=True)
    run_ranks(fill_language, 1, config, published.weight_map, same)
    with pytest.raises(RankError, match=r"no place in the model: lm_head\.weight\."):
        run_ranks(fill_language, 1, config, published.weight_map, weights)


class OnDemand(Mapping[str, Tensor]):
    """Names are known at once, tensors only when asked for, as from files."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_tensors_are_read_one_by_one_and_once() -> None:
    published = make_llama()
    tensors = OnDemand({**weights_of(published), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert tensors.read == []
    to_ours(published.weight_map, tensors)
    assert sorted(tensors.read) == sorted(weights_of(published))


def test_half_of_a_pair_is_named() -> None:
    published = make_llama()
    weights = weights_of(published)
    del weights["model.layers.1.mlp.up_proj.weight"]
    message = (
        r"language\.decoder\.layers\.1\.mlp\.linear_fc1\.weight: the given weights lack model\.layers\.1\.mlp\.up_proj"
    )
    with pytest.raises(ValueError, match=message):
        to_ours(published.weight_map, weights)


def test_wrong_heads_are_named() -> None:
    table = llama.weight_map(language_config(num_query_groups=4))
    message = (
        r"linear_qkv\.weight: .*v_proj\.weight have \[32, 16, 16\] rows, which are not 4 heads in 4 groups\. Check"
    )
    with pytest.raises(ValueError, match=message):
        to_ours(table, weights_of(make_llama()))


def test_many_leftovers_are_counted() -> None:
    strangers = {f"stranger.{number:02d}": torch.zeros(1) for number in range(20)}
    message = (
        r"weights: 20 of the given tensors have no place in the model: stranger\.00, .*stranger\.07, \.\.\.\. Check"
    )
    with pytest.raises(ValueError, match=message):
        to_ours(make_llama().weight_map, {**weights_of(make_llama()), **strangers})


def test_a_key_without_a_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"language\.gate\.weight: the weight map has no row for it"):
        to_theirs(make_llama().weight_map, {"language.gate.weight": torch.zeros(1)})


def test_families_refuse_recipes_of_other_families() -> None:
    with pytest.raises(ValueError, match=r"model\.language\.add_qkv_bias=False: every Qwen2 has a bias"):
        qwen2.weight_map(language_config())
    config = make_internvl().config
    clip_shape = {"image_size": 56, "patch_size": 14, "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8}
    other = config.model_copy(update={"vision": ClipConfig(**clip_shape, num_attention_heads=1)})
    for make_map in (internvl.weight_map, internvl.original_weight_map):
        with pytest.raises(ValueError, match=r"model\.vision\.kind='clip': InternVL's is internvit\. Set kind"):
            make_map(other)


def test_layers_after_the_selected_one_are_unused() -> None:
    config = InternViTConfig(
        image_size=56,
        patch_size=14,
        num_layers=12,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=1,
        normalization="LayerNorm",
        qk_layernorm=False,
        add_qkv_bias=True,
        select_layer=-2,
    )
    table = internvit.weight_map(config)
    assert table.is_unused("encoder.layer.11.mlp.fc1.bias")
    assert not table.is_unused("encoder.layer.1.mlp.fc1.bias")
    assert not table.is_unused("encoder.layer.10.mlp.fc1.bias")
