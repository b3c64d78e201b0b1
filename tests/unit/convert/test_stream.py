"""Folders there and back: the weights bit by bit, and the same outputs in our engine. Shape letters as in parity.py."""

import json
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from hf_folder import (
    BOTH_TOWERS,
    FOLDERS,
    as_published,
    assert_same_tensors,
    edit_config,
    edit_tensors,
    save,
    tensors_of,
)
from parity import read_weights, relative_difference
from published import IMAGE_TOKEN, VOCAB_SIZE, make_internvl
from test_model_parity import LENGTH, ROWS, make_batch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, InternVLVisionModel

from megavlm.batch import Batch
from megavlm.checkpoint import load_checkpoint
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.config import load_recipe
from megavlm.convert import internvl
from megavlm.convert.families import FAMILIES
from megavlm.convert.folder import convert_folder
from megavlm.convert.parts import ModelFile, ModelParts
from megavlm.convert.weight_map import to_ours
from megavlm.engines import MegatronEngine, MegatronEngineConfig
from megavlm.models.config import VLMConfig
from megavlm.models.initialization import initialize_weights
from megavlm.models.vlm import VLM

LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}


def in_engine(
    checkpoint: Path, model: VLMConfig, tp: int, pp: int, batch: Batch | None
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """On ranks: the weights of a verified checkpoint, and on one rank also the logits ``[N, S, V]`` and features."""
    engine = MegatronEngine(MegatronEngineConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    engine.start()
    settings = engine.config.megatron_settings()
    chunks = [
        VLM(
            model,
            settings,
            vocab_size=VOCAB_SIZE,
            image_token_id=IMAGE_TOKEN,
            pre_process=stage.pre_process,
            post_process=stage.post_process,
        )
        for stage in engine.stages()
    ]
    initialize_weights(chunks, seed=1)
    engine.wrap(chunks, training=False)
    loaded = load_checkpoint(
        checkpoint, engine, with_optimizer=False, allow_missing_parts=("vision", "connector", "language")
    )
    weights = {key: tensor for key, tensor in read_weights(*chunks).items() if key not in loaded.missing}
    if batch is None:
        return weights, None, None
    chunk = chunks[0]
    with torch.no_grad():
        logits = chunk(batch, torch.ones_like(batch.tokens)).view(ROWS, LENGTH, VOCAB_SIZE)
        return weights, logits, chunk.vision(batch.tiles) if len(batch.tiles) else None


def model_around(parts: ModelParts) -> VLMConfig:
    """A whole model that has the parts."""
    other = ModelParts.of(make_internvl().config)
    fields = {name: getattr(parts, name) or getattr(other, name) for name in ("vision", "connector", "language")}
    return ModelParts(**fields).whole()


def weight_map_of(folder: Path, parts: ModelParts) -> internvl.WeightMap:
    return FAMILIES[json.loads((folder / "config.json").read_text())["architectures"][0]].weight_map(parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "internvit_qk_norm", "internvl"])
def test_weights_come_into_the_engine_under_every_layout(family: str, layout: str, tmp_path: Path) -> None:
    save(family, tmp_path / "hf")
    checkpoint = convert_folder(tmp_path / "hf", tmp_path / "run")
    parts = load_recipe(tmp_path / "run" / "model.yaml", [], ModelFile).model
    tp, pp = LAYOUTS[layout]
    answers = run_ranks(in_engine, tp * pp, checkpoint, model_around(parts), tp, pp, None)
    expected = to_ours(weight_map_of(tmp_path / "hf", parts), tensors_of(tmp_path / "hf"))
    assert_same_tensors(answers[0][0], expected)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "llama_3_1", "mistral", "qwen2", "qwen2_tied"])
def test_language_models_give_the_same_logits(family: str, tmp_path: Path) -> None:
    published = save(family, tmp_path / "hf")
    checkpoint = convert_folder(tmp_path / "hf", tmp_path / "run")
    parts = load_recipe(tmp_path / "run" / "model.yaml", [], ModelFile).model
    batch = without_tiles(make_batch(torch.Generator().manual_seed(5)))
    ((_, logits, _),) = run_ranks(in_engine, 1, checkpoint, model_around(parts), 1, 1, batch)
    with torch.no_grad():
        expected = published(batch.tokens).logits
    # Worst seen: 3.5e-7.
    assert relative_difference(logits, expected) < 5e-6


@pytest.mark.parametrize("family", ["internvl", "internvl_tied", "llava", "llava_siglip"])
def test_whole_models_give_the_same_logits(family: str, tmp_path: Path) -> None:
    published = save(family, tmp_path / "hf")
    checkpoint = convert_folder(tmp_path / "hf", tmp_path / "run")
    parts = load_recipe(tmp_path / "run" / "model.yaml", [], ModelFile).model
    batch = make_batch(torch.Generator().manual_seed(5), parts.whole().vision.image_size)
    ((_, logits, _),) = run_ranks(in_engine, 1, checkpoint, model_around(parts), 1, 1, batch)
    with torch.no_grad():
        expected = published(input_ids=batch.tokens, pixel_values=batch.tiles).logits
    # Worst seen: 6.8e-7.
    assert relative_difference(logits, expected) < 5e-6


@pytest.mark.parametrize("family", ["internvit", "internvit_qk_norm"])
def test_vision_encoders_give_the_same_features(family: str, tmp_path: Path) -> None:
    published = save(family, tmp_path / "hf")
    checkpoint = convert_folder(tmp_path / "hf", tmp_path / "run")
    parts = load_recipe(tmp_path / "run" / "model.yaml", [], ModelFile).model
    batch = make_batch(torch.Generator().manual_seed(5))
    ((_, _, features),) = run_ranks(in_engine, 1, checkpoint, model_around(parts), 1, 1, batch)
    with torch.no_grad():
        expected = published(batch.tiles).last_hidden_state[:, 1:]
    # Worst seen: 9.8e-7.
    assert relative_difference(features, expected) < 5e-6


def without_tiles(batch: Batch) -> Batch:
    tokens = batch.tokens.where(batch.tokens != IMAGE_TOKEN, 0)
    return Batch(
        tokens=tokens,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        tiles=batch.tiles[:0],
        tiles_per_image=batch.tiles_per_image[:0],
        visible_tiles=batch.visible_tiles,
    )


@pytest.mark.parametrize("max_shard_size", [None, "20KB"])
@pytest.mark.parametrize("family", sorted(FOLDERS.keys() - BOTH_TOWERS))
def test_weights_survive_there_and_back(family: str, max_shard_size: str | None, tmp_path: Path) -> None:
    options = {} if max_shard_size is None else {"max_shard_size": "20KB"}
    save(family, tmp_path / "hf", **options)
    convert_folder(tmp_path / "hf", tmp_path / "run")
    back = convert_folder(tmp_path / "run", tmp_path / "back", max_shard_size=max_shard_size)
    assert (back / "model.safetensors").exists() == (max_shard_size is None)
    assert_same_tensors(tensors_of(back), as_published(family, tensors_of(tmp_path / "hf")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "run"]


@pytest.mark.parametrize("max_shard_size", ["2GB", "20KB"])
@pytest.mark.parametrize(
    "family", ["llama_tied", "llama_3_1", "qwen2", "internvit", "internvl", "internvl_tied", "llava_siglip"]
)
def test_transformers_loads_what_was_written(family: str, max_shard_size: str, tmp_path: Path) -> None:
    published = save(family, tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    back = convert_folder(tmp_path / "run", tmp_path / "back", max_shard_size=max_shard_size)
    whole = AutoModelForImageTextToText
    kind = {"internvit": InternVLVisionModel, "internvl": whole, "llava_siglip": whole}.get(
        family.removesuffix("_tied"), AutoModelForCausalLM
    )
    loaded, info = kind.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is type(published)
    assert_same_tensors(loaded.state_dict(), published.state_dict())
    inner = published.config.get_text_config()
    assert loaded.config.get_text_config().to_dict().get("max_position_embeddings") == inner.to_dict().get(
        "max_position_embeddings"
    )


@pytest.mark.parametrize("part", ["language", "vision"])
def test_a_part_of_a_model_can_be_written_alone(part: str, tmp_path: Path) -> None:
    published = save("internvl", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    back = convert_folder(tmp_path / "run", tmp_path / "back", part=part)
    kind = AutoModelForCausalLM if part == "language" else InternVLVisionModel
    loaded, info = kind.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    if part == "vision":
        assert_same_tensors(loaded.state_dict(), published.model.vision_tower.state_dict())
    else:
        assert_same_tensors(loaded.model.state_dict(), published.model.language_model.state_dict())
        assert torch.equal(loaded.lm_head.weight, published.lm_head.weight)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_type_of_the_weights_can_be_chosen(dtype: str, tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    back = convert_folder(tmp_path / "run", tmp_path / "back", dtype=dtype)
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert_same_tensors(
        tensors_of(back), {name: tensor.to(wanted) for name, tensor in tensors_of(tmp_path / "hf").items()}
    )
    assert AutoModelForCausalLM.from_pretrained(back, dtype="auto").dtype == wanted


def test_types_are_kept_where_they_differ(tmp_path: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].bfloat16()

    save("llama", tmp_path / "hf")
    edit_tensors(tmp_path / "hf", halve)
    convert_folder(tmp_path / "hf", tmp_path / "run")
    back = convert_folder(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tensors_of(back), tensors_of(tmp_path / "hf"))


def test_new_rows_of_the_vocabulary_are_the_mean_of_the_others(tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    checkpoint = convert_folder(tmp_path / "hf", tmp_path / "run", ["model.language.vocab_size=53"])
    weights = CheckpointWeights(checkpoint)
    published = tensors_of(tmp_path / "hf")
    for ours, theirs in (("embedding.word_embeddings", "model.embed_tokens"), ("output_layer", "lm_head")):
        found, old = weights[f"language.{ours}.weight"], published[f"{theirs}.weight"]
        assert torch.equal(found[:VOCAB_SIZE], old)
        assert torch.equal(found[VOCAB_SIZE:], old.mean(0).expand(3, -1))
    back = convert_folder(tmp_path / "run", tmp_path / "back")
    assert AutoModelForCausalLM.from_pretrained(back).config.vocab_size == 53


def test_what_was_selected_is_what_is_built(tmp_path: Path) -> None:
    save("internvl", tmp_path / "hf")
    edit_config(tmp_path / "hf", vision_feature_layer=-2)
    convert_folder(tmp_path / "hf", tmp_path / "run")
    assert load_recipe(tmp_path / "run" / "model.yaml", [], ModelFile).model.whole().vision.select_layer == -2
    back = convert_folder(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tensors_of(back), tensors_of(tmp_path / "hf"))
    loaded = AutoModelForImageTextToText.from_pretrained(back)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    batch = make_batch(torch.Generator().manual_seed(5))
    with torch.no_grad():
        found, expected = (m(input_ids=batch.tokens, pixel_values=batch.tiles).logits for m in (loaded, theirs))
    assert torch.equal(found, expected)


def test_a_model_of_another_precision_takes_the_weights(tmp_path: Path) -> None:
    save("qwen2", tmp_path / "hf")
    edit_tensors(tmp_path / "hf", lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    checkpoint = convert_folder(tmp_path / "hf", tmp_path / "run")
    parts = load_recipe(tmp_path / "run" / "model.yaml", [], ModelFile).model
    ((weights, _, _),) = run_ranks(in_engine, 1, checkpoint, model_around(parts), 1, 1, None)
    expected = to_ours(weight_map_of(tmp_path / "hf", parts), tensors_of(tmp_path / "hf"))
    assert_same_tensors(weights, {key: tensor.float() for key, tensor in expected.items()})
