"""Which image the text of a document sees in training, drawn for each document."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_data import TILE_SIZE, TOKENS_PER_TILE, chat

from megavlm.batch import TileRoute
from megavlm.data import (
    DATASETS,
    Conversation,
    DataConfig,
    Loader,
    Sample,
    SampleProcessor,
    Tokenizer,
    parse_conversation,
)

ROUTE = TileRoute(context_tiles="all", context_tags="text", text_sees="last_image")
LAST, NEXT = [(0, 0), (0, 1), (1, 2)], [(0, 1), (1, 2), (0, 0)]  # "a", image, "b", image, "c"


@pytest.fixture
def make(byte_tokenizer: Tokenizer) -> Callable[[float], SampleProcessor]:
    def make_processor(probability: float) -> SampleProcessor:
        tree = {
            "train": {"kind": "jsonl", "path": "unused"},
            "seq_length": 64,
            "tiling": {"kind": "whole"},
            "tile_tags": "none",
            "image_wrapper": "none",
            "chat_template": "plain",
            "next_image_probability": probability,
        }
        config = DataConfig.model_validate(tree)
        return SampleProcessor(config, byte_tokenizer, TILE_SIZE, TOKENS_PER_TILE, ROUTE)

    return make_processor


@pytest.fixture
def image(write_image: Callable[..., Path]) -> str:
    return str(write_image("8.png", 8, 8))


def read(row: dict[str, Any]) -> Conversation:
    return parse_conversation(row, "rows.jsonl:1", Path("/"))


def document(image: str) -> dict[str, Any]:
    return {"text": "a<image>b<image>c", "images": [image, image]}


def seen(sample: Sample) -> list[tuple[int, int]]:
    """By the first three tokens of a document's text."""
    return [tuple(pair) for pair in sample.visible_tiles.tolist()][:3]


def test_only_documents_and_only_in_training(make: Callable[[float], SampleProcessor], image: str) -> None:
    processor, rows = make(1.0), read(document(image))
    drawing = processor.for_training(3)
    assert seen(drawing("rows.jsonl:1", rows)) == NEXT
    assert seen(processor("rows.jsonl:1", rows)) == LAST  # validation
    assert drawing.measure("rows.jsonl:1", rows) == processor.measure("rows.jsonl:1", rows)
    prompt = drawing.prompt("rows.jsonl:1", rows).sample
    assert [tuple(pair) for pair in prompt.visible_tiles.tolist()] == LAST[:2]
    question = read(chat("<image>x<image>", "y", [image, image]))
    tiles = [each("rows.jsonl:1", question).visible_tiles.tolist() for each in (drawing, processor)]
    assert tiles[0] == tiles[1]
    assert seen(make(0.0).for_training(3)("rows.jsonl:1", rows)) == LAST


def test_seed_and_sample_decide(make: Callable[[float], SampleProcessor], image: str) -> None:
    rows, keys = read(document(image)), [f"/data/rows.jsonl:{number}" for number in range(120)]

    def draws(probability: float, seed: int, folder: str = "/data") -> list[bool]:
        processor = make(probability).for_training(seed)
        return [seen(processor(key.replace("/data", folder), rows)) == NEXT for key in keys]

    half = draws(0.5, seed=1)
    assert 45 < sum(half) < 75
    assert half == draws(0.5, seed=1, folder="/elsewhere/else")
    assert half != draws(0.5, seed=2)
    rarely = draws(0.1, seed=1)
    assert 3 < sum(rarely) < 25
    assert all(often for often, rare in zip(half, rarely, strict=True) if rare)


def test_loaders_draw_alike_wherever_they_begin(
    make: Callable[[float], SampleProcessor], image: str, write_rows: Callable[..., Path]
) -> None:
    dataset = DATASETS["jsonl"].model_validate({"path": write_rows([document(image)] * 24)}).build()

    def batches(**settings: Any) -> list[list[int]]:
        defaults = {"micro_batch_size": 2, "global_batch_size": 4, "data_parallel_rank": 0, "data_parallel_size": 1}
        loader = Loader(dataset, make(0.5).for_training(1), seed=5, **defaults | settings)
        found = []
        for _, step in zip(range(6), loader, strict=False):
            found += [batch.visible_tiles[:, 0, 1].tolist() for batch in step]
        return found

    # the first token sees one tile or none; both occur in one batch or another
    whole = batches()
    assert {value for batch in whole for value in batch} >= {0, 1}
    assert batches(consumed_samples=8)[:8] == whole[4:12]
    assert batches(data_parallel_size=2) == whole[::2]
    assert batches(data_parallel_size=2, data_parallel_rank=1) == whole[1::2]
