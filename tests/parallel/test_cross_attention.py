"""What gated cross-attention lets tokens see, and what it leaves alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from tiny_vlm import (
    ADDING_H,
    ALL_PARTS,
    FLAMINGO,
    TILE_SIZE,
    TINY,
    H,
    X,
    build_tiny,
    make_routed_batch,
    make_sample,
    mixed_batches,
    open_gates,
)

from megavlm.batch import Batch
from megavlm.checkpoint import load_checkpoint, save_checkpoint
from megavlm.data.collate import pack
from megavlm.engines import OptimizerSettings
from megavlm.models.config import VLMConfig

SWIGLU = {**FLAMINGO, "fusion": {**FLAMINGO["fusion"], "feed_forward": {"activation": "swiglu"}}}
MODELS = {"X": X, "H": H, "H_adding": ADDING_H, "Flamingo": SWIGLU}
TP2_SP_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "bf16": (1, {"precision": "bf16"}),
    "4": (4, TP2_SP_PP2),
}


def last_image(model: dict[str, Any]) -> dict[str, Any]:
    return {**model, "fusion": {**model["fusion"], "text_sees": "last_image"}}


# ---- zero gates --------------------------------------------------------------------------------------------------


def without_tiles(batch: Batch) -> Batch:
    """The same tokens as a batch of texts for a model without cross-attention."""
    return replace(
        batch,
        tiles=batch.tiles[:0],
        tiles_per_image=batch.tiles_per_image[:0],
        visible_tiles=torch.zeros_like(batch.visible_tiles),
        tile_rows=batch.tile_rows[:0],
        tile_context=batch.tile_context[:0],
        tile_tags=batch.tile_tags[:0],
        context_length=0,
    )


def logits_of(
    engine_config: dict[str, Any], model: dict[str, Any], batches: list[Batch], gate: float, num_steps: int = 0
) -> list[np.ndarray]:
    """Logits of all tokens, after some steps with the language model and the vision encoder frozen."""
    engine, chunks = build_tiny(engine_config, ("connector", "cross_attention"), model)
    open_gates(chunks, gate)
    if num_steps:
        engine.build_optimizer(OptimizerSettings(lr=1e-2))
        for step in range(num_steps):
            steps = mixed_batches(step, chunks[0].route)
            assert engine.train_step(steps[engine.data_parallel_rank :: engine.data_parallel_size]).skip_reason is None
    return [engine.logits(batch, torch.ones_like(batch.tokens), 100).float().numpy() for batch in batches]


def batches_of(model: dict[str, Any]) -> list[Batch]:
    """A batch of texts, and one with images of one and several tiles."""
    route = VLMConfig.model_validate(model).fusion.tile_route
    return [make_routed_batch([[], []], 1, route), make_routed_batch([[3], [1, 2]], 2, route)]


@pytest.mark.parametrize("model", ["X", "Flamingo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_closed_gates_leave_the_language_model_as_it_was(layout: str, model: str) -> None:
    world_size, engine = LAYOUTS[layout]
    settings = MODELS[model]
    batches = batches_of(settings)
    base = run_ranks(logits_of, world_size, engine, TINY, [without_tiles(batch) for batch in batches], 0.0)
    closed = run_ranks(logits_of, world_size, engine, settings, batches, 0.0)
    opened = run_ranks(logits_of, world_size, engine, settings, batches, 0.5)
    for number in (0, 1):
        np.testing.assert_array_equal(closed[0][number], base[0][number])
    if model == "X":
        np.testing.assert_array_equal(opened[0][0], base[0][0])  # texts see nothing, whatever the gates
    else:  # they go through the gated feed-forward layers all the same
        assert np.abs(opened[0][0] - base[0][0]).max() > 0.01
    assert np.abs(opened[0][1] - base[0][1]).max() > 0.01


@pytest.mark.parametrize("model", ["X", "H"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_keep_their_logits_while_a_frozen_language_model_learns_to_see(layout: str, model: str) -> None:
    world_size, engine = LAYOUTS[layout]
    batches = batches_of(MODELS[model])
    base = run_ranks(logits_of, world_size, engine, TINY, [without_tiles(batches[0])], 0.0)
    [fresh, *_] = run_ranks(logits_of, world_size, engine, MODELS[model], batches, 0.0)
    [trained, *_] = run_ranks(logits_of, world_size, engine, MODELS[model], batches, 0.0, 4)
    np.testing.assert_array_equal(trained[0], base[0][0])
    assert np.abs(trained[1] - fresh[1]).max() > 1e-3, "training changed nothing"


# ---- who sees what -----------------------------------------------------------------------------------------------

# Samples of make_sample: two tokens of text, then for each image three of text, its tags and placeholders, two of text.
TEXT_BEFORE, TEXT_BEHIND, TAG, PLACEHOLDERS = 3, 2, 2, 4


def permitted(images: list[int], tile: int, length: int, *, is_hybrid: bool, only_last_image: bool) -> set[int]:
    """Positions of a sample that may see a tile of the context, counted by hand from its layout."""
    position, first_tile = 2, 0
    seen: set[int] = set()
    target_image = next(i for i, _ in enumerate(images) if tile < sum(images[: i + 1]))
    ends = []
    for number, num_tiles in enumerate(images):
        position += TEXT_BEFORE
        for index in range(num_tiles):
            is_thumbnail = index == num_tiles - 1
            if is_hybrid and not is_thumbnail:
                continue
            if not is_hybrid and first_tile + index == tile:
                seen |= set(range(position, position + TAG))
            position += TAG
            if is_hybrid:
                if number == target_image:
                    seen |= set(range(position, position + PLACEHOLDERS))
                position += PLACEHOLDERS
        ends.append(position)
        first_tile += num_tiles
        position += TEXT_BEHIND
    inside_later_images: set[int] = set()
    position = 2
    for number, num_tiles in enumerate(images):
        size = (TAG + PLACEHOLDERS) if is_hybrid else TAG * num_tiles
        start = position + TEXT_BEFORE
        if number > target_image:
            inside_later_images |= set(range(start, start + size))
        position = start + size + TEXT_BEHIND
    stop = length
    if only_last_image and target_image + 1 < len(images):
        size = (TAG + PLACEHOLDERS) if is_hybrid else TAG * images[target_image + 1]
        stop = ends[target_image + 1] - size
    return seen | (set(range(ends[target_image], stop)) - inside_later_images)


def changed_tokens(
    model: dict[str, Any], batch: Batch
) -> list[tuple[int, list[tuple[int, int]], list[tuple[int, int]]]]:
    """For each tile of the context: who changes in the first cross-attention when its pixels do, and in the end."""
    _, [chunk] = build_tiny({}, ALL_PARTS, model)
    chunk.eval()
    outputs: list[torch.Tensor] = []
    layer = chunk.language.decoder.layers[0].cross_attention
    layer.register_forward_hook(lambda module, inputs, output: outputs.append(output[0].detach()))

    def run(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs.clear()
        everywhere = torch.ones_like(batch.tokens)
        with torch.no_grad():
            logits = chunk(replace(batch, tiles=tiles), wanted_logits=everywhere)
        return outputs[0].transpose(0, 1), logits.view(*batch.tokens.shape, -1)

    def differences(first: torch.Tensor, second: torch.Tensor) -> list[tuple[int, int]]:
        return [tuple(place) for place in (first != second).any(-1).nonzero().tolist()]

    base = run(batch.tiles)
    found = []
    for tile in (batch.tile_context != 0).nonzero().flatten().tolist():
        tiles = batch.tiles.clone()
        tiles[tile] = 255 - tiles[tile]
        attended, logits = run(tiles)
        found.append((tile, differences(attended, base[0]), differences(logits, base[1])))
    return found


ROWS: dict[str, list[list[list[int]]]] = {  # rows of samples of images of tiles
    "one_image": [[[3]]],
    "several_images": [[[2, 3, 1]]],
    "several_rows": [[[2]], [[]], [[1, 4]]],
    "packed": [[[2], [], [3, 2]], [[4]]],
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("only_last_image", [False, True])
@pytest.mark.parametrize("model", ["X", "H", "H_adding"])
def test_a_tile_changes_exactly_the_tokens_that_may_see_it(model: str, only_last_image: bool, rows: str) -> None:
    settings = last_image(MODELS[model]) if only_last_image else MODELS[model]
    route = VLMConfig.model_validate(settings).fusion.tile_route
    generator = torch.Generator().manual_seed(5)
    samples = [[make_sample(images, generator, 20, route) for images in row] for row in ROWS[rows]]
    batch = pack(samples, pad_id=0, tile_size=TILE_SIZE, uses_context=True)
    [found] = run_ranks(changed_tokens, 1, settings, batch)

    expected: dict[int, tuple[set[tuple[int, int]], set[tuple[int, int]]]] = {}
    first_tile = 0
    for number, (row, images_of_row) in enumerate(zip(samples, ROWS[rows], strict=True)):
        start = 0
        for sample, images in zip(row, images_of_row, strict=True):
            length = sample.num_tokens
            stop = batch.tokens.shape[1] if sample is row[-1] else start + length  # padding goes with the last sample
            for tile in range(sum(images)):
                seen = permitted(images, tile, length, is_hybrid=model != "X", only_last_image=only_last_image)
                places = {(number, start + position) for position in seen}
                later = {(number, position) for position in range(start + min(seen, default=length), stop)}
                expected[first_tile + tile] = (places, later)
            first_tile += sum(images)
            start += length
    assert [tile for tile, *_ in found] == (batch.tile_context != 0).nonzero().flatten().tolist()
    assert found, "no tile is in the context"
    for tile, attended, logits in found:
        places, later = expected[tile]
        assert set(attended) == places, f"tile {tile}"
        # through self-attention the news goes on to later tokens of the sample, and to nobody else
        assert places <= set(logits) <= later, f"tile {tile}"


# ---- checkpoints -------------------------------------------------------------------------------------------------

BEFORE = TP2_SP_PP2
AFTER: dict[str, tuple[int, dict[str, Any]]] = {
    "same": (4, TP2_SP_PP2),
    "1": (1, {}),
    "dp2": (2, {}),
    "pp2_vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
}


def train(folder: Path, engine_config: dict[str, Any], model: dict[str, Any], *, resumes: bool) -> list[float]:
    engine, chunks = build_tiny(engine_config, ALL_PARTS, model)
    engine.build_optimizer(OptimizerSettings(lr=1e-2, adam_eps=1e-4))
    losses = []

    def step(number: int) -> None:
        batches = mixed_batches(number, chunks[0].route)
        result = engine.train_step(batches[engine.data_parallel_rank :: engine.data_parallel_size])
        losses.extend([result.loss, result.grad_norm])

    if resumes:
        open_gates(chunks, 3.0)  # what a resumed run holds before it loads must not matter
        load_checkpoint(folder, engine, with_optimizer=True)
    else:
        step(0)
        step(1)
        save_checkpoint(folder, 2, engine)
        losses.clear()
    step(2)
    step(3)
    return losses


def resume(folder: Path, engine_config: dict[str, Any], model: dict[str, Any]) -> list[float]:
    return train(folder, engine_config, model, resumes=True)


def begin(folder: Path, engine_config: dict[str, Any], model: dict[str, Any]) -> list[float]:
    return train(folder, engine_config, model, resumes=False)


@pytest.mark.parametrize("model", ["X", "H", "Flamingo"])
def test_training_goes_on_under_the_same_and_other_layouts(tmp_path: Path, model: str) -> None:
    expected = run_ranks(begin, 4, tmp_path, BEFORE, MODELS[model])[0]
    for name, (world_size, layout) in AFTER.items():
        results = run_ranks(resume, world_size, tmp_path, layout, MODELS[model])[0]
        if name == "same":
            assert results == expected
        else:
            np.testing.assert_allclose(results, expected, rtol=1e-5, err_msg=name)


# ---- what does not fit -------------------------------------------------------------------------------------------


def message_of(model: dict[str, Any], batch: Batch) -> str:
    _, [chunk] = build_tiny({}, ALL_PARTS, model)
    with pytest.raises(ValueError, match="batch") as caught:
        chunk(batch)
    return str(caught.value)


def test_a_batch_for_another_fusion_is_refused() -> None:
    good = batches_of(H)[1]
    tight = replace(good, tile_context=torch.where(good.tile_context > 0, good.tile_context - 1, 0))
    [message] = run_ranks(message_of, 1, TINY, good)
    assert message.startswith("batch.context_length=12: does not fit a model without cross-attention")
    [message] = run_ranks(message_of, 1, H, without_tiles(good))
    assert message.startswith("batch.context_length=0: does not fit a model with cross-attention")
    [message] = run_ranks(message_of, 1, H, tight)
    assert "tile 0 of the context has room for 5 tokens, but its 4 features and its tag take 6" in message
    [message] = run_ranks(message_of, 1, X, batches_of(H)[1])
    assert "tile 0 of the context has room for 6 tokens, but its 4 features and its tag take 4" in message
