"""What sees what in BLIP-2's first stage, by changing one thing and looking at what changes; and pairs in batches."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megavlm.batch import Batch
from megavlm.models.backend import BACKENDS
from megavlm.models.blip2 import QFormerText, QFormerTextConfig
from megavlm.models.blip2.pair import find_pairs
from megavlm.models.connectors.qformer import QFormer, QFormerConfig
from megavlm.runtime import process

SETTINGS: dict[str, Any] = {"params_dtype": torch.float32, "perform_initialization": False}
IMAGE, PAD = 19, 0
QUERIES = 2


@pytest.fixture(autouse=True, scope="module")
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


@pytest.fixture
def modules() -> tuple[QFormer, QFormerText]:
    language = QFormerTextConfig(max_position_embeddings=8, contrast_size=6)
    qformer = QFormerConfig(num_tokens=QUERIES, num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2)
    built = language.build(qformer, 5, SETTINGS, BACKENDS["torch"], vocab_size=20, image_token_id=IMAGE, seed=3)
    torch.manual_seed(1)
    for module in built:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return built


def batch(*rows: list[int], images: tuple[int, ...] | None = None) -> Batch:
    """Rows of captions behind an image each, all trained, padded on the right."""
    images = images or (1,) * len(rows)
    longest = max(QUERIES * count + len(row) for row, count in zip(rows, images, strict=True))
    tokens = torch.full((len(rows), longest), PAD)
    loss_mask = torch.zeros(len(rows), longest)
    for number, (row, count) in enumerate(zip(rows, images, strict=True)):
        start = QUERIES * count
        tokens[number, :start] = IMAGE
        tokens[number, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
        loss_mask[number, max(0, start - 1) : start + len(row) - 1] = 1.0
    return Batch(
        tokens=tokens,
        labels=torch.where(loss_mask > 0, tokens.roll(-1, 1), 0),
        loss_mask=loss_mask,
        position_ids=torch.arange(longest).repeat(len(rows), 1),
        cu_seqlens=torch.arange(0, len(rows) * longest + 1, longest, dtype=torch.int32),
        tiles=torch.zeros(sum(images), 3, 4, 4, dtype=torch.uint8),
        tiles_per_image=torch.ones(sum(images), dtype=torch.int64),
        visible_tiles=torch.zeros(len(rows), longest, 2, dtype=torch.int64),
        row_lengths=torch.tensor([QUERIES * count + len(row) for row, count in zip(rows, images, strict=True)]),
    )


def compare_and_write(
    modules: tuple[QFormer, QFormerText], caption: list[int], features: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Images and captions to compare, and what writes the caption, of the first of two rows."""
    qformer, text = modules
    pairs = find_pairs(batch(caption, [5, 6, 7, 8, 9]), IMAGE, QUERIES)
    with torch.no_grad():
        images, texts, to_write = text._compare_and_write(qformer, features, pairs)
    return images[0], texts[0], to_write[0]


@pytest.mark.parametrize("changed", range(4))
def test_one_token_of_the_caption(modules: tuple[QFormer, QFormerText], changed: int) -> None:
    """Images see no caption; captions are compared whole; each token is written from those before it."""
    features = torch.randn(2, 3, 5)
    caption = [1, 2, 3, 4]
    other = [*caption[:changed], 12, *caption[changed + 1 :]]
    images, texts, to_write = compare_and_write(modules, caption, features)
    other_images, other_texts, other_to_write = compare_and_write(modules, other, features)
    assert torch.equal(images, other_images)
    assert not torch.allclose(texts, other_texts, atol=1e-4)
    moved = (to_write - other_to_write).abs().amax(1) > 1e-4
    # the state that writes token t has read those before t; the fifth is padding
    assert moved[:4].tolist() == [number > changed for number in range(4)]


def test_the_image(modules: tuple[QFormer, QFormerText]) -> None:
    """Captions to compare see no image; every token that is written does."""
    features = torch.randn(2, 3, 5)
    other = features.clone()
    other[0, 1, 2] += 1.0
    images, texts, to_write = compare_and_write(modules, [1, 2, 3, 4], features)
    other_images, other_texts, other_to_write = compare_and_write(modules, [1, 2, 3, 4], other)
    assert not torch.allclose(images, other_images, atol=1e-4)
    assert torch.equal(texts, other_texts)
    assert bool(((to_write - other_to_write).abs().amax(1) > 1e-5)[:4].all())


def test_padding_changes_nothing(modules: tuple[QFormer, QFormerText]) -> None:
    features = torch.randn(2, 3, 5)
    qformer, text = modules
    padded = find_pairs(batch([1, 2], [5, 6, 7, 8, 9]), IMAGE, QUERIES)
    alone = find_pairs(batch([1, 2]), IMAGE, QUERIES)
    with torch.no_grad():
        first = text._compare_and_write(qformer, features, padded)
        second = text._compare_and_write(qformer, features[:1], alone)
        judged = text.judge(qformer, features, padded.text, padded.is_text)[0]
        judged_alone = text.judge(qformer, features[:1], alone.text, alone.is_text)[0]
    for one, other in zip(first, second, strict=True):
        # Measured worst: 1.2e-7
        torch.testing.assert_close(one[0, : other.shape[1]] if one.dim() > 2 else one[0], other[0], rtol=0, atol=3e-6)
    torch.testing.assert_close(judged, judged_alone, rtol=0, atol=3e-6)


@pytest.mark.parametrize("changed", [0, 3])
def test_a_judge_sees_everything(modules: tuple[QFormer, QFormerText], changed: int) -> None:
    qformer, text = modules
    features, caption = torch.randn(1, 3, 5), torch.tensor([[1, 2, 3, 4]])
    is_text = torch.ones_like(caption, dtype=torch.bool)
    other = caption.clone()
    other[0, changed] = 12
    with torch.no_grad():
        before, with_text = (text.judge(qformer, features, one, is_text) for one in (caption, other))
        with_image = text.judge(qformer, features + torch.eye(3, 5), caption, is_text)
    assert not torch.allclose(before, with_text, atol=1e-5)
    assert not torch.allclose(before, with_image, atol=1e-5)


def test_captions_are_found_wherever_the_image_stands() -> None:
    made = batch([1, 2, 3], [4])
    moved = torch.tensor([1, 2, IMAGE, IMAGE, 3])
    made.tokens[0] = moved
    pairs = find_pairs(made, IMAGE, QUERIES)
    assert pairs.text.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert pairs.is_text.tolist() == [[True] * 3, [True, False, False]]


def test_rows_that_train_nothing_are_no_pairs() -> None:
    made = batch([1, 2], [])
    made.tokens[1], made.loss_mask[1] = PAD, 0.0
    made = dataclasses.replace(made, tiles=made.tiles[:1], row_lengths=torch.tensor([4, 0]))
    pairs = find_pairs(made, IMAGE, QUERIES)
    assert pairs.is_pair.tolist() == [True, False]
    features = torch.randn(1, 3, 5)
    spread = pairs.spread(features)
    assert torch.equal(spread[0], features[0])
    assert not spread[1].any()


@pytest.mark.parametrize(
    ("rows", "images", "tiles", "message"),
    [
        (([1, 2], [3]), (1, 2), 3, r"row 1 has 2 tiles, and model\.language\.kind='qformer_text' learns from pairs"),
        (([1, 2], [3, 4]), (1, 0), 1, r"row 1 has 0 tiles"),
        (([1, 2], [3]), (1, 1), 1, r"batch: has 4 image tokens, and 1 tiles give 2, 2 in a row"),
    ],
)
def test_what_is_no_pair_is_told(
    rows: tuple[list[int], ...], images: tuple[int, ...], tiles: int, message: str
) -> None:
    made = dataclasses.replace(batch(*rows, images=images), tiles=torch.zeros(tiles, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=message):
        find_pairs(made, IMAGE, QUERIES)


def test_a_caption_that_is_too_long_is_told(modules: tuple[QFormer, QFormerText]) -> None:
    qformer, text = modules
    with pytest.raises(ValueError, match=r"max_position_embeddings=8: a caption has 8 tokens, and 7 fit"):
        text.embed_texts(qformer, batch([1] * 8, [2]))
