"""BERT's weights in a Q-Former: its text side is that BERT, and queries start with its feed-forward layers."""

from pathlib import Path
from typing import Any

import checkpoint_model
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from harness import run_ranks
from tiny_vlm import TINY

from megavlm.checkpoint import load_checkpoint
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.config import load_recipe, validate
from megavlm.convert.bert import start_from_bert, tensors_of
from megavlm.convert.read_hf import PublishedFolder
from megavlm.engines import MegatronEngine, MegatronEngineConfig
from megavlm.models.blip2.pair import matching_mask
from megavlm.models.taken import lies_in
from megavlm.planning.parameters import build_whole
from megavlm.recipe import Recipe

EXAMPLES = Path(__file__).parents[3] / "examples"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<image>", *"abcdefghij"]
SIZES = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIG = transformers.BertConfig(**SIZES, intermediate_size=48, max_position_embeddings=20, hidden_dropout_prob=0.0)


def write_bert(folder: Path, model_class: Any = transformers.BertForMaskedLM) -> Any:
    """A BERT with random weights, biases and norms too, and its tokenizer."""
    torch.manual_seed(3)
    model = model_class(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=vocabulary, eos_token="[SEP]").save_pretrained(folder)
    return model


def recipe_for(folder: Path, **connector: Any) -> Recipe:
    model = {
        **TINY,
        "connector": {
            "kind": "qformer",
            "num_tokens": 4,
            "num_layers": 3,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            **connector,
        },
        "language": {"kind": "qformer_text", "max_position_embeddings": 16, "vocab_size": len(WORDS) + 1},
    }
    optimizer = {"lr": 0.1}
    training = {"trainable": ["connector", "text"], "train_iters": 1, "global_batch_size": 2, "micro_batch_size": 2}
    return validate(
        {
            "model": model,
            "tokenizer": {"kind": "huggingface", "path": str(folder), "image_token": "<image>"},
            "data": {"train": {"kind": "jsonl", "path": "nowhere"}, "seq_length": 12, "tiling": {"kind": "whole"}}
            | {"tile_tags": "none", "image_wrapper": "none", "over_length": "skip"},
            "engine": {"kind": "megatron"},
            "training": {**training, "optimizer": optimizer},
            "checkpoint": {"save": "run"},
        },
        Recipe,
        "test",
    )


def compare(folder: Path) -> None:
    bert = write_bert(folder / "bert")
    parts = start_from_bert(folder / "bert", recipe_for(folder / "bert"), folder / "run")
    text = torch.tensor([[5, 9, 7, 14, 6], [8, 13, 0, 0, 0]])
    is_text = torch.tensor([[True] * 5, [True, True, False, False, False]])
    with torch.no_grad():
        states = parts.connector.run_layers(parts.text._embed(0, text), None, matching_mask(0, is_text))
        with_class = torch.cat([torch.full((2, 1), WORDS.index("[CLS]")), text], dim=1)
        mask = torch.cat([torch.ones(2, 1, dtype=torch.bool), is_text], dim=1)
        expected = bert.bert(input_ids=with_class, attention_mask=mask).last_hidden_state
        # float32: 1.4e-6 measured, of states up to 2.8; the logits are the same to the bit
        torch.testing.assert_close(states[mask], expected[mask], rtol=0, atol=1e-5)
        side = parts.text
        written = side.caption_norm(F.gelu(side.caption_transform(expected)))
        logits = F.linear(written, side.word_embeddings, side.caption_bias)[..., : len(WORDS)]
        torch.testing.assert_close(logits, bert.cls(expected), rtol=0, atol=1e-5)
        layer = parts.connector.layers[1]
        assert torch.equal(layer.query_ffn(expected), layer.text_ffn(expected))
    weights = CheckpointWeights(folder / "run" / "release")
    for name, parameter in parts.named_parameters():
        assert torch.equal(weights[name], parameter), name


def test_the_text_side_is_bert(tmp_path: Path) -> None:
    run_ranks(compare, 1, tmp_path)


def fill_from(folder: Path) -> None:
    """Folders of BertModel alone, and with the first names of norms, give the same layers; a model takes them."""
    write_bert(folder / "new", transformers.BertModel)
    file = folder / "new/model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in safetensors.torch.load_file(file).items()
    }
    write_bert(folder / "old", transformers.BertModel)
    safetensors.torch.save_file(old, folder / "old/model.safetensors")
    new = start_from_bert(folder / "new", recipe_for(folder / "new"), folder / "run_new")
    checkpoint_model.leave()
    again = start_from_bert(folder / "old", recipe_for(folder / "old"), folder / "run_old")
    same = dict(again.named_parameters())
    assert all(torch.equal(parameter, same[name]) for name, parameter in new.named_parameters())
    engine = MegatronEngine(MegatronEngineConfig())
    engine.wrap([again], training=False)
    loaded = load_checkpoint(folder / "run_new", engine, with_optimizer=False)
    assert (loaded.missing, loaded.unexpected) == ((), ())


def test_folders_of_other_shapes(tmp_path: Path) -> None:
    run_ranks(fill_from, 1, tmp_path)


def test_it_holds_two_parts_of_a_first_stage(tmp_path: Path) -> None:
    write_bert(tmp_path)
    recipe = recipe_for(tmp_path)
    with build_whole(recipe, len(WORDS) + 1) as model:
        names = {name for name, _ in model.named_parameters() if not lies_in(name, "vision")}
    tensors = tensors_of(PublishedFolder(tmp_path), 3, WORDS.index("[CLS]"))
    filled = {name for name, _ in tensors}
    assert filled < names
    fresh = {name for name in names - filled if "cross_attention" not in name}
    assert fresh == {
        "connector.queries",
        "text.temperature",
        *(
            f"text.{module}.{kind}"
            for module in ("image_projection", "text_projection", "matching_head")
            for kind in ("weight", "bias")
        ),
    }


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        (
            {"num_layers": 4},
            r"model\.connector\.num_layers=4: .*config\.json has num_hidden_layers=3\. Change the recipe",
        ),
        ({"ffn_hidden_size": 64}, r"ffn_hidden_size=64: .*has intermediate_size=48"),
        ({"layernorm_epsilon": 1e-5}, r"layernorm_epsilon=1e-05: .*has layer_norm_eps=1e-12"),
    ],
)
def test_other_widths_are_named(tmp_path: Path, connector: dict[str, Any], message: str) -> None:
    write_bert(tmp_path / "bert")
    with pytest.raises(ValueError, match=message):
        start_from_bert(tmp_path / "bert", recipe_for(tmp_path / "bert", **connector), tmp_path / "run")


def test_other_recipes_folders_and_targets_are_named(tmp_path: Path) -> None:
    bert = tmp_path / "bert"
    write_bert(bert)
    recipe = recipe_for(bert)
    with pytest.raises(ValueError, match=r"target=.*bert: exists already"):
        start_from_bert(bert, recipe, bert)
    with pytest.raises(
        ValueError, match=r"model\.language\.kind='decoder': BERT's weights are for a Q-Former and its text"
    ):
        start_from_bert(bert, load_recipe(EXAMPLES / "llava/tiny.yaml", [], Recipe), tmp_path / "run")
    for changes, message in (
        ({"max_position_embeddings": 32}, r"max_position_embeddings=32: are more than the 20 of .*Lower it"),
        ({"vocab_size": 9}, r"vocab_size=9: has room for the 15 of .*Raise it"),
    ):
        language = recipe.model.language.model_copy(update=changes)
        changed = recipe.model_copy(update={"model": recipe.model.model_copy(update={"language": language})})
        with pytest.raises(ValueError, match=message):
            start_from_bert(bert, changed, tmp_path / "run")
    tensors = safetensors.torch.load_file(bert / "model.safetensors")
    del tensors["bert.encoder.layer.2.output.dense.bias"]
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.2\.output\.dense\.bias: is not in the folder"):
        dict(tensors_of(tensors, 3, 2))
