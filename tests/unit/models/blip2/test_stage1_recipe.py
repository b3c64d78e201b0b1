"""What a recipe of BLIP-2's first stage may say, and what each refusal tells."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megavlm.build import check_run
from megavlm.config import load_recipe
from megavlm.convert.parts import ModelParts
from megavlm.data import DataConfig, SampleError, SampleProcessor
from megavlm.data.datasets import JsonlDatasetConfig
from megavlm.models.config import VLMConfig
from megavlm.models.part import part_of
from megavlm.planning.flops import count_flops
from megavlm.planning.row import full_row
from megavlm.recipe import Recipe

TINY = Path(__file__).parents[4] / "examples/blip2/tiny_stage1.yaml"


def load(*overrides: str) -> Recipe:
    return load_recipe(TINY, overrides, Recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.tile_tags=1d", r"data\.tile_tags='1d': .* learns from pairs.*Set it to none"),
        ("data.image_wrapper=nvlm", r"data\.image_wrapper='nvlm'.*Set it to none"),
        ("data.tiling={kind: dynamic}", r"data\.tiling\.kind='dynamic'.*Set it to whole or square"),
        ("data.over_length=truncate_images", r"data\.over_length='truncate_images'.*skip or truncate_text"),
        ("data.packing={}", r"data\.packing=.*Set it to null"),
        ("data.seq_length=80", r"data\.seq_length=80: leaves 76 tokens for a caption, and .*=32 has room for 31"),
        ("engine.pipeline_model_parallel_size=2", r"pipeline_model_parallel_size=2: .* are one pipeline stage"),
        ("engine={kind: deepspeed}", r"engine\.kind='deepspeed'.*Set them to megatron and 1"),
        ("model.connector={kind: linear}", r"connector\.kind='linear' and fusion\.kind='decoder_only'"),
        ("model.fusion={kind: hybrid, every_n_layers: 2}", r"fusion\.kind='hybrid'\. Set them to qformer"),
        ("training.trainable=[connector]", r"the text side of the Q-Former starts untrained"),
        ("training.trainable=[text, language]", r"kind='qformer_text' has no language\. Name text in its place"),
        ("model.language.hidden_size=4", r"model\.language\.hidden_size=4: unknown key"),
        ("model.language.label_smoothing=1.0", r"label_smoothing"),
    ],
)
def test_what_does_not_fit_is_told(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(override)


def test_other_models_have_no_text_side() -> None:
    with pytest.raises(ValueError, match=r"kind='decoder' has no text\. Name language in its place"):
        load_recipe(TINY.with_name("tiny.yaml"), ["training.trainable=[connector, text]"], Recipe)


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=["one rank", "tp2"])
def test_a_micro_batch_of_one_pair_has_no_negatives(layout: tuple[int, int]) -> None:
    world_size, tp = layout
    recipe = load("training.micro_batch_size=1", f"engine.tensor_model_parallel_size={tp}")
    with pytest.raises(ValueError, match=r"micro_batch_size=1: with 1 data-parallel rank a micro-batch is 1 pair"):
        check_run(recipe, world_size)
    check_run(recipe, 2 * world_size)


def test_heads_of_the_q_former_are_not_shared_by_ranks() -> None:
    check_run(load("engine.tensor_model_parallel_size=4", "model.connector.num_attention_heads=1"), 4)


def test_what_needs_a_decoder_says_so() -> None:
    recipe = load()
    assert recipe.model.learns_from_pairs
    for needs_one in (lambda: recipe.model.decoder, lambda: ModelParts.of(recipe.model)):
        with pytest.raises(ValueError, match=r"kind='qformer_text': BLIP-2's first stage has no language model"):
            needs_one()


def test_a_decoder_need_not_be_named() -> None:
    tree = load_recipe(TINY.with_name("tiny.yaml"), [], Recipe).model.model_dump()
    tree["language"].pop("kind")
    assert VLMConfig.model_validate(tree).decoder.kind == "decoder"


def test_the_text_side_is_a_part() -> None:
    assert part_of("text.word_embeddings") == "text"
    assert part_of("connector.layers.3.text_ffn.up.weight") == "text"
    assert part_of("connector.layers.3.query_ffn.up.weight") == "connector"


class WordTokenizer:
    """Letters as tokens."""

    vocab_size, pad_id, eos_id, bos_id, image_token_id = 100, 0, 1, None, 99

    def encode(self, text: str, *, starts_text: bool = False) -> list[int]:
        return [2 + ord(letter) % 90 for letter in text]

    def special_id(self, text: str) -> int | None:
        return None


def test_samples_that_are_no_pairs_are_skipped(tmp_path: Path) -> None:
    """Told as others that cannot be used, so that a blend may hold some."""
    from_gpt = {"from": "gpt", "value": "a caption"}
    rows = [
        {"id": "text", "conversations": [{"from": "human", "value": "say"}, from_gpt]},
        {
            "id": "two",
            "image": ["a.png", "a.png"],
            "conversations": [{"from": "human", "value": "<image><image>"}, from_gpt],
        },
        {"id": "pair", "image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, from_gpt]},
    ]
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = load().data.model_dump() | {"train": {"kind": "jsonl", "path": path}, "valid": None}
    processor = SampleProcessor(DataConfig(**config), WordTokenizer(), 32, 4, pairs_only=True)  # type: ignore[arg-type]
    dataset = JsonlDatasetConfig(path=path).build()
    for number, num_tiles in ((0, 0), (1, 2)):
        with pytest.raises(SampleError, match=rf"not_a_pair: has {num_tiles} tiles; a pair is one tile"):
            processor(*dataset[number])
    assert processor(*dataset[2]).tiles.shape == (1, 3, 32, 32)


def test_operations_of_a_pair() -> None:
    """Worked out for one layer by hand."""
    recipe = load("model.connector.num_layers=1", "model.connector.ffn_hidden_size=128", "model.vision.select_layer=-2")
    row = full_row(recipe)
    flops = count_flops(recipe.model, row, vocab_size=100, trainable=["connector", "text"])
    width, queries, captions, patches = 64, 4, 20, 17
    products = 0
    for rows, text in ((1, 2 * captions + 1), (3, captions + 1)):
        length = queries + text
        attention = 2 * rows * (length**2 + queries * patches) * width
        linear = 4 * rows * length * width**2 + 2 * rows * (queries + patches) * width**2
        products += attention + linear + 2 * rows * length * width * 128
    heads = (queries + 1) * width * 32 + 3 * queries * width * 2 + captions * (width**2 + width * 100)
    assert flops.forward["connector"] + flops.forward["text"] == 2 * (products + heads)
    assert flops.backward["vision"] == 0
    assert flops.forward["vision"] > 0
