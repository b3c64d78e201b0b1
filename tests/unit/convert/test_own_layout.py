"""MegaVLM's own layout: what the engine computes, the exported folder computes; its weights come back bit by bit."""

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from hf_folder import edit_config
from own_layout_case import (
    CLIP,
    MODELS,
    NUM_NEW_TOKENS,
    batch_inputs,
    batches_of,
    prompt_inputs,
    prompts_of,
    save_and_answer,
)
from parity import relative_difference
from torch import Tensor
from transformers import AutoModelForImageTextToText

from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.cli import main
from megavlm.convert.config_of import architecture_of
from megavlm.convert.folder import convert_folder
from megavlm.convert.own_layout import TENSORS, GroupedKV, weight_map
from megavlm.convert.parts import ModelParts, weight_shapes
from megavlm.convert.receipt import make_receipt
from megavlm.convert.stock_class import CANNOT_CARRY, reasons_against
from megavlm.convert.weight_map import to_theirs
from megavlm.models.config import VLMConfig
from megavlm.models.connectors import CONNECTORS

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits.flatten(0, 1).float()


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported NVLM-H (``hf``) beside its checkpoint (``run``)."""
    folder = tmp_path_factory.mktemp("hybrid")
    run_ranks(save_and_answer, 1, {}, MODELS["H_add"], folder / "run")
    convert_folder(folder / "run", folder / "hf")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_exported_model_computes_the_same(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    [(expected, answers)] = run_ranks(save_and_answer, 1, {}, model, tmp_path / "run")
    convert_folder(tmp_path / "run", tmp_path / "hf")
    theirs = load(tmp_path / "hf")
    for batch, ours in zip(batches_of(model), expected, strict=True):
        found = logits_of(theirs, batch_inputs(batch, model))
        # Worst seen: 6.1e-7.
        assert relative_difference(found, ours) < 5e-6
    prompts = prompts_of(model)
    for use_cache in (True, False):
        generated = theirs.generate(
            **prompt_inputs(prompts, model), max_new_tokens=NUM_NEW_TOKENS, do_sample=False, use_cache=use_cache
        )
        assert generated[:, -NUM_NEW_TOKENS:].tolist() == answers
    convert_folder(tmp_path / "hf", tmp_path / "back")
    first, second = (
        CheckpointWeights(tmp_path / "run" / "iter_0000001"),
        CheckpointWeights(tmp_path / "back" / "release"),
    )
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["H_concatenate", "D_without_bias"])
def test_a_receipt_holds(name: str, tmp_path: Path) -> None:
    run_ranks(save_and_answer, 1, {}, MODELS[name], tmp_path / "run")
    convert_folder(tmp_path / "run", tmp_path / "hf")
    receipt = make_receipt(tmp_path / "run", tmp_path / "hf")
    receipt.require()
    assert receipt.reload is not None
    assert (receipt.reload.class_name, receipt.not_compared) == ("MegaVLMForConditionalGeneration", [])
    assert [row.name for row in receipt.outputs][-2:] == ["picture 1", "picture 2"]
    # Worst seen: 5.5e-7.
    assert max(row.max_rel for row in receipt.outputs) < 5e-6
    assert any("cross_attention" in row.key for row in receipt.tensors) == (name != "D_without_bias")


@pytest.mark.parametrize("changed", ["modeling_megavlm.py", "layers_megavlm.py", "auto_map", "vision_config"])
def test_code_that_is_not_ours_is_not_run(changed: str, tmp_path: Path) -> None:
    run_ranks(save_and_answer, 1, {}, MODELS["D_without_bias"], tmp_path / "run")
    folder, mark = convert_folder(tmp_path / "run", tmp_path / "hf"), tmp_path / "it_ran"
    if changed.endswith(".py"):
        (folder / changed).write_text(f"open({str(mark)!r}, 'w')\n" + (folder / changed).read_text())
    elif changed == "auto_map":
        (folder / "foreign.py").write_text(f"open({str(mark)!r}, 'w')\n")
        edit_config(folder, auto_map={"AutoModelForImageTextToText": "foreign.Model"})
    else:
        config = json.loads((folder / "config.json").read_text())["vision_config"]
        edit_config(folder, vision_config={**config, "auto_map": {"AutoConfig": "someone/else--there.Config"}})
    receipt = make_receipt(tmp_path / "run", folder)
    assert changed in receipt.not_compared[0]
    assert "other code is not run" in receipt.verdict
    assert receipt.outputs == []
    assert not mark.exists()


@pytest.mark.parametrize(("name", "layout"), [("X", "tp2"), ("H_add", "pp2")])
def test_checkpoints_of_several_ranks_are_exported(name: str, layout: str, tmp_path: Path) -> None:
    answered = run_ranks(save_and_answer, 2, LAYOUTS[layout], MODELS[name], tmp_path / "run")
    convert_folder(tmp_path / "run", tmp_path / "hf")
    theirs = load(tmp_path / "hf")
    for batch, ours in zip(batches_of(MODELS[name]), answered[0][0], strict=True):
        # Worst seen: 6.0e-7.
        assert relative_difference(logits_of(theirs, batch_inputs(batch, MODELS[name])), ours) < 5e-6


def test_bfloat16_is_near_float32(hybrid: Path, tmp_path: Path) -> None:
    convert_folder(hybrid / "run", tmp_path / "hf", dtype="bf16")
    rounded, exact = load(tmp_path / "hf", torch.bfloat16), load(tmp_path / "hf")
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    for batch in batches_of(MODELS["H_add"]):
        inputs = batch_inputs(batch, MODELS["H_add"])
        # Worst seen: 1.2e-2.
        assert relative_difference(logits_of(rounded, inputs), logits_of(exact, inputs)) < 5e-2


def test_transformers_saves_what_it_loaded(hybrid: Path, tmp_path: Path) -> None:
    first = load(hybrid / "hf")
    first.save_pretrained(tmp_path / "again")
    second = load(tmp_path / "again")
    inputs = batch_inputs(batches_of(MODELS["H_add"])[2], MODELS["H_add"])
    assert torch.equal(logits_of(first, inputs), logits_of(second, inputs))
    convert_folder(tmp_path / "again", tmp_path / "back")
    saved, back = CheckpointWeights(hybrid / "run" / "iter_0000001"), CheckpointWeights(tmp_path / "back" / "release")
    assert all(torch.equal(saved[key], back[key]) for key in saved)


def test_beams_take_their_row_s_tiles_along(hybrid: Path) -> None:
    theirs, prompts = load(hybrid / "hf"), prompts_of(MODELS["H_add"])
    settings = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    together = theirs.generate(**prompt_inputs(prompts, MODELS["H_add"]), **settings)[:, -NUM_NEW_TOKENS:]
    alone = [
        theirs.generate(**prompt_inputs([prompt], MODELS["H_add"]), **settings)[:, -NUM_NEW_TOKENS:]
        for prompt in prompts
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_tiles": None}, r"num_tiles=None: is needed for 2 rows"),
        ({"num_tiles": torch.tensor([5, 3])}, r"num_tiles=\[5, 3\]: does not fit 2 rows with 7 tiles"),
        ({"visible_tiles": None}, r"visible_tiles.shape=None: images need one of \(2, 40, 2\)"),
        ({"visible_tiles": torch.zeros(2, 3, 2)}, r"visible_tiles.shape=\(2, 3, 2\): images need"),
        ({"tile_in_context": None}, r"tile_in_context=None: is needed with pixel_values in NVLM-H"),
        (
            {"tile_in_context": torch.ones(7, dtype=torch.bool)},
            r"input_ids: hold 12 image placeholders \(token 99\), but 0",
        ),
        (
            {"tile_in_context": torch.ones(2, dtype=torch.bool)},
            r"tile_in_context: is of 2 tiles, and pixel_values has 7",
        ),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 40, 32)}, r"inputs_embeds: was given with pixel_values"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], problem: str, hybrid: Path) -> None:
    inputs = batch_inputs(batches_of(MODELS["H_add"])[2], MODELS["H_add"])
    with pytest.raises(ValueError, match=problem):
        load(hybrid / "hf")(**{**inputs, **change})


@pytest.mark.parametrize(
    ("architecture", "problem"),
    [  # the parts of a sentence that others come between
        (
            "MllamaForConditionalGeneration",
            r"cannot carry this model: .*thumbnail tokens.*q_norm, k_norm.*feed-forward layer",
        ),
        (
            "IdeficsForVisionText2Text",
            r"cannot carry this model: .*no norm between.*as many key/value heads as query heads",
        ),
        ("InternVLForConditionalGeneration", r"has no place for .*model.fusion.kind='hybrid' \(only decoder_only\)"),
        ("LlamaForCausalLM", r"is no class that whole models are written for\. Choose of InternVL"),
    ],
)
def test_a_class_that_cannot_carry_the_model_is_refused(
    architecture: str, problem: str, hybrid: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=f"--architecture={architecture}: {problem}"):
        main(["convert", str(hybrid / "run"), str(tmp_path / "hf"), "--architecture", architecture])
    assert not (tmp_path / "hf").exists()


def test_the_language_model_alone_says_what_it_leaves_out(
    hybrid: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert_folder(hybrid / "run", tmp_path / "hf", part="language")
    assert "--part=language: leaves the cross-attention of 2 layers out (model.fusion.kind=hybrid)" in caplog.text
    caplog.clear()
    convert_folder(hybrid / "run", tmp_path / "tower", part="vision")
    assert "leaves the cross-attention" not in caplog.text


@pytest.mark.parametrize("kind", sorted(set(CONNECTORS) - {"mlp"}))
def test_connectors_without_a_class_are_named(kind: str) -> None:
    parts = ModelParts.model_validate({**MODELS["X"], "connector": {"kind": kind}})
    with pytest.raises(ValueError, match=rf"no class for model.connector.kind='{kind}' \(only mlp\)"):
        architecture_of(parts)
    with pytest.raises(ValueError, match="MllamaForConditionalGeneration: cannot carry this model"):
        architecture_of(parts, "MllamaForConditionalGeneration")


def test_two_encoders_have_no_class() -> None:
    dual = {"kind": "dual", "encoders": [CLIP, {**CLIP, "hidden_size": 48}], "combine": "concatenate"}
    parts = ModelParts.model_validate({**MODELS["X"], "vision": dual})
    with pytest.raises(ValueError, match=r"no class for model.vision.kind='dual' \(only internvit, clip"):
        architecture_of(parts)
    assert architecture_of(parts.only("language")) == "Qwen2ForCausalLM"


def test_a_part_has_the_class_that_it_has(hybrid: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--architecture=CLIPVisionModel: cannot carry the vision of this model"):
        convert_folder(hybrid / "run", tmp_path / "hf", part="vision", architecture="CLIPVisionModel")
    with pytest.raises(ValueError, match="--architecture=X: is for the way to Hugging Face"):
        convert_folder(hybrid / "hf", tmp_path / "run", architecture="X")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"fusion": {"kind": "perceiver"}},
            r"fusion.kind='perceiver' \(supported: decoder_only, cross_attention",
        ),
        ({"fusion": {"kind": "hybrid"}}, r"fusion has \['kind'\], and \['every_n_layers', 'first_layer', 'kind'"),
        ({"connector": None}, r"connector=None: is no part of a model"),
        ({"connector": {"bias": True}}, r"connector has \['bias'\], and"),
        ({"text_config": {"model_type": "gemma"}}, r"text_config.model_type='gemma' \(supported: llama, qwen2\)"),
        ({"vision_config": {"model_type": "vit"}}, r"vision_config.model_type='vit' \(supported: internvl_vision"),
    ],
)
def test_a_damaged_configuration_is_refused(change: dict[str, Any], problem: str, hybrid: Path, tmp_path: Path) -> None:
    shutil.copytree(hybrid / "hf", tmp_path / "hf")
    edit_config(tmp_path / "hf", **change)
    with pytest.raises(ValueError, match=f"config.json: {problem}"):
        convert_folder(tmp_path / "hf", tmp_path / "run")


@pytest.mark.parametrize("architecture", CANNOT_CARRY)
def test_no_class_with_cross_attention_carries_any_model(architecture: str) -> None:
    for name, tree in MODELS.items():
        reasons = reasons_against(architecture, VLMConfig.model_validate(tree))
        assert any("context_layernorm" in reason for reason in reasons), name
        assert any("and this model has none" in reason for reason in reasons) == name.startswith("D"), name
        assert any("thumbnail tokens" in reason for reason in reasons) == name.startswith("H"), name


def test_keys_and_values_are_cut_into_groups() -> None:
    layout = GroupedKV(3)
    ours = torch.arange(3 * 2 * 4).reshape(-1, 1)
    key, value = layout.split(ours)
    assert key.flatten().tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    assert torch.equal(layout.merge([key, value]), ours)
    with pytest.raises(ValueError, match=r"have \[12, 8\] rows, which are not keys and values of 3 groups"):
        layout.merge([key, value[:8]])


@pytest.mark.parametrize("name", ["X_clip_last_image", "H_add", "D_one_layer"])
def test_every_tensor_is_documented_with_its_dimensions(name: str) -> None:
    shapes = weight_shapes(ModelParts.of(VLMConfig.model_validate(MODELS[name])), 100)
    table = weight_map(VLMConfig.model_validate(MODELS[name]))
    tensors = to_theirs(table, {key: torch.empty(entry.shape) for key, entry in shapes.items()})
    for tensor, value in tensors.items():
        found = [shape for pattern, (shape, _) in TENSORS.items() if documents(pattern, tensor)]
        assert len(found) == 1, tensor
        assert not found[0].startswith("[") or found[0].count(",") + 1 == value.ndim, tensor


def documents(pattern: str, name: str) -> bool:
    patterns = [pattern.replace("{weight,bias}", leaf).replace("{layer}", "[0-9]*") for leaf in ("weight", "bias")]
    return any(fnmatch.fnmatchcase(name, one) for one in patterns)


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "WEIGHTS.md").read_text(encoding="utf-8")
    for name, (shape, meaning) in TENSORS.items():
        assert f"| `{name}` | {shape} | {meaning} |" in page
