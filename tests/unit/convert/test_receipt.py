"""Receipts of conversions: they hold for what was converted right, and name what is not."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from hf_folder import edit_config, edit_tensors, save
from published import IMAGE_TOKEN, VOCAB_SIZE
from test_stream_original import original_folder
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megavlm.cli import main
from megavlm.convert.folder import convert_folder
from megavlm.convert.receipt import make_receipt
from megavlm.convert.receipt.output import Answers, compare_outputs
from megavlm.convert.receipt.pair import find_pair
from megavlm.convert.receipt.probe import Probe, make_probes
from megavlm.convert.receipt.tensor import compare_tensors

FLIPPED = "model.layers.1.mlp.down_proj.weight"
TEXTS = ["random tokens 1", "random tokens 2", "random tokens 3"]
PICTURES = ["picture 1", "picture 2"]
CASES = {
    "llama": (["model.language.vocab_size=53"], TEXTS),
    "internvl": ([], TEXTS + PICTURES),
    "internvit_qk_norm": ([], PICTURES),
    "llava_siglip": ([], TEXTS + PICTURES),
    "clip_vision": (["model.vision.select_layer=-2", "model.vision.keep_class_token=true"], PICTURES),
}
"""A decoder, two whole models, two towers: each receipt starts a process; other tests compare the other families."""


WHOLE = {"internvl", "llava_siglip"}
NOT_ALL_OURS = {"llava_siglip", "clip_vision"}
"""With layers, norms, heads or text towers that our model has no use for; the receipt names them."""


@pytest.mark.parametrize("family", CASES)
def test_what_was_converted_holds(family: str, tmp_path: Path) -> None:
    overrides, inputs = CASES[family]
    save(family, tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run", overrides)
    receipt = make_receipt(tmp_path / "hf", tmp_path / "run", overrides)
    receipt.require()
    assert receipt.faults == []
    assert all(row.bit_equal for row in receipt.tensors)
    assert receipt.not_compared == []
    assert [one.name for one in receipt.unmapped if one.is_fault] == []
    assert bool(receipt.unmapped) == (family in NOT_ALL_OURS)
    assert [row.name for row in receipt.outputs] == inputs
    assert all(len(row.ours) == (8 if row.name in TEXTS or family in WHOLE else 0) for row in receipt.outputs)
    # Worst seen: features 9.4e-7, logits 6.7e-7 (KL 8.6e-14).
    assert max(row.max_rel for row in receipt.outputs) < 5e-6
    notes = {row.key: row.note for row in receipt.tensors if row.note}
    new_rows = dict.fromkeys(("embedding.word_embeddings", "output_layer"), "3 of our 53 rows are new")
    has_new_rows = "model.language.vocab_size=53" in overrides
    assert notes == ({f"language.{name}.weight": note for name, note in new_rows.items()} if has_new_rows else {})
    tree = json.loads((tmp_path / "run" / "receipt.json").read_text())
    assert (tree["holds"], tree["faults"], len(tree["outputs"])) == (True, [], len(inputs))
    assert tree["reload"]["loading_info"].keys() >= {"missing_keys", "unexpected_keys"}
    assert receipt.verdict in (tmp_path / "run" / "receipt.md").read_text()


def test_a_flipped_value_is_found_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[FLIPPED][3, 5] += 1

    save("llama_tied", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    back = convert_folder(tmp_path / "run", tmp_path / "back", dtype="bf16")
    edit_tensors(back, flip)
    with pytest.raises(SystemExit, match="the receipt does not hold") as end:
        main(["convert", str(tmp_path / "run"), str(back), "--verify-only"])
    problem = f"language.decoder.layers.1.mlp.linear_fc2.weight ({FLIPPED}): 1 of 1536 values differ"
    assert problem in str(end.value)
    assert "\n" not in str(end.value)
    assert f"receipt: does not hold: {problem}" in capsys.readouterr().out
    tree = json.loads((back / "receipt.json").read_text())
    assert not tree["holds"]
    assert "first at [3, 5]" in tree["faults"][0]
    assert any("relative logits difference" in fault for fault in tree["faults"][1:])
    assert [layer["num_bit_equal"] - layer["num_tensors"] for layer in tree["layers"]] == [0, 0, -1, 0]


def test_rounded_weights_are_compared_as_rounded(tmp_path: Path) -> None:
    save("llama_tied", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    back = convert_folder(tmp_path / "run", tmp_path / "back", dtype="bf16")
    receipt = make_receipt(tmp_path / "run", back)
    receipt.require()
    assert {row.note for row in receipt.tensors} == {"ours is float32"}
    assert {row.dtype for row in receipt.tensors} == {"bfloat16"}
    assert [(one.name, one.reason.split(":")[0]) for one in receipt.unmapped] == [
        ("language.output_layer.weight", "tied")
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rms_norm_eps": 0.1}, r"random tokens 1: relative logits difference \S+ > 0\.0001"),
        ({"num_hidden_layers": 3}, r"LlamaForCausalLM: missing keys: model\.layers\.2\."),
        ({"vocab_size": 60}, r"transformers' LlamaForCausalLM fails on .*hf: "),
    ],
)
def test_equal_weights_of_another_model_do_not_hold(change: dict[str, float], problem: str, tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    edit_config(tmp_path / "hf", **change)
    receipt = make_receipt(tmp_path / "hf", tmp_path / "run")
    assert all(row.bit_equal for row in receipt.tensors)
    with pytest.raises(ValueError, match=f"the receipt does not hold: {problem}"):
        receipt.require()


def test_names_without_a_counterpart_are_named(tmp_path: Path) -> None:
    save("qwen2_tied", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.2.mlp.down_proj.weight"] = torch.ones(2, 2)
        tensors["model.strange.weight"] = torch.ones(2)
        del tensors["model.norm.weight"]

    edit_tensors(tmp_path / "hf", add)
    rows, unmapped = compare_tensors(find_pair(tmp_path / "hf", tmp_path / "run"))
    assert [(row.key, "lack model.norm.weight" in row.problem) for row in rows if row.fault] == [
        ("language.decoder.final_layernorm.weight", True)
    ]
    assert {one.name: (one.is_fault, one.reason) for one in unmapped if one.side == "theirs"} == {
        "lm_head.weight": (False, "tied: the same bits as model.embed_tokens.weight"),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (
            False,
            "unused: our model has no use for *.rotary_emb.inv_freq",
        ),
        "model.layers.2.mlp.down_proj.weight": (
            True,
            "belongs to language.decoder.layers.2.mlp.linear_fc2.weight, which ours lacks",
        ),
        "model.strange.weight": (True, "no row of the weight map is about it"),
    }
    receipt = make_receipt(tmp_path / "hf", tmp_path / "run")
    assert any("model.strange.weight (theirs): no row of the weight map" in fault for fault in receipt.faults)
    assert receipt.outputs == []
    assert receipt.not_compared[0].startswith("logits not compared: the tensors do not fit")


@pytest.mark.parametrize("architecture", ["InternVLChatModel", "NVLM_D"])
def test_remote_code_is_not_run(architecture: str, tmp_path: Path) -> None:
    original_folder(tmp_path / "hf", architecture)
    convert_folder(tmp_path / "hf", tmp_path / "run")
    receipt = make_receipt(tmp_path / "hf", tmp_path / "run")
    receipt.require()
    assert receipt.tensors
    assert receipt.verdict == (
        f"holds, for tensors; logits not compared: no class of {architecture} without remote code"
    )


def test_texts_go_through_the_tokenizer_of_the_folder(tmp_path: Path) -> None:
    save("internvl", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    words = {"<eos>": 0, "other": 1, "the": 2, "two": 3, "picture": 4, "<image>": IMAGE_TOKEN}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="other"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    wrapped.save_pretrained(tmp_path / "hf")
    pair = find_pair(tmp_path / "hf", tmp_path / "run")
    probes = make_probes(pair, VOCAB_SIZE, IMAGE_TOKEN).probes
    assert [probe.name for probe in probes] == ["sentence 1", "sentence 2", "sentence 3", *PICTURES]
    assert [int((probe.tokens == 2).sum()) for probe in probes[:3]] == [2, 1, 0]  # with a capital it is "other"
    assert [int((probe.tokens == IMAGE_TOKEN).sum()) for probe in probes] == [0, 0, 0, 4, 4]
    assert [tuple(probe.tiles.shape) for probe in probes[3:]] == [(1, 3, 56, 56)] * 2
    # a vocabulary that the tokenizer does not fit gives random tokens, and a placeholder outside it no pictures
    small = make_probes(pair, 4, IMAGE_TOKEN)
    assert [probe.name for probe in small.probes] == TEXTS
    assert small.not_compared == ["pictures not compared: image_token_id=49 is none of the 4 tokens"]


def test_a_difference_that_is_no_number_does_not_hold() -> None:
    probe = Probe("row", torch.arange(2), torch.zeros(0), torch.zeros(0))
    expected = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    found = expected.clone()
    found[1, 2] = torch.nan
    (row,) = compare_outputs([probe], Answers([expected], [[1]]), Answers([found], [[2]]))
    assert [fault.split(": ")[1].split()[0] for fault in row.faults] == ["relative", "KL", "greedy"]


@pytest.mark.parametrize("option", [("--part", "language"), ("--dtype", "bf16"), ("--max-shard-size", "1GB")])
def test_only_a_conversion_takes_its_settings(option: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"{option[0]}={option[1]}: is for a conversion"):
        main(["convert", str(tmp_path), str(tmp_path), "--verify-only", *option])


def test_folders_of_different_models_are_refused(tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    save("internvl", tmp_path / "other")
    with pytest.raises(ValueError, match=r"has no vision, connector, and .*other has"):
        make_receipt(tmp_path / "other", tmp_path / "run")
    with pytest.raises(ValueError, match="nothing: holds no checkpoint"):
        make_receipt(tmp_path / "hf", tmp_path / "nothing")
