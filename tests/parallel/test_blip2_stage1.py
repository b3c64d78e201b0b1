"""BLIP-2's first stage under layouts: negatives from all data-parallel ranks, resumed runs, and the way to stage 2."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import RankError, run_ranks
from tiny_vlm import TILE_SIZE, TINY, Outcome, assemble, build_tiny, gradient_shards, make_sample

from megavlm.batch import ALL_AMONG_TOKENS, Batch, SkippedSample
from megavlm.checkpoint import load_checkpoint, save_checkpoint
from megavlm.data import Sample, collate
from megavlm.engines import MegatronEngine, OptimizerSettings
from megavlm.models.part import PARTS

QFORMER: dict[str, Any] = {
    "kind": "qformer",
    "num_tokens": 4,
    "num_layers": 3,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 2,
    "init_method_std": 0.2,
}
LANGUAGE = {"kind": "qformer_text", "max_position_embeddings": 32, "contrast_size": 8, "temperature": 0.3}
STAGE1: dict[str, Any] = {**TINY, "connector": QFORMER, "language": LANGUAGE}
STAGE2: dict[str, Any] = {**TINY, "connector": QFORMER}
TRAINABLE = ("vision", "connector", "text")
ONE = {"use_distributed_optimizer": False}
NUM_ROWS = 4
"""Of a micro-batch, over all data-parallel ranks."""


def samples(step: int, micro_batch: int) -> list[Sample | SkippedSample]:
    """Pairs of an image and a text around it, of different lengths; one cannot be read."""
    generator = torch.Generator().manual_seed(10 * step + micro_batch)
    made: list[Sample | SkippedSample] = [
        make_sample([1], generator, 14 + 3 * row, ALL_AMONG_TOKENS) for row in range(NUM_ROWS)
    ]
    if micro_batch == 1:
        made[step % NUM_ROWS] = SkippedSample("made", "image_unreadable", "for the test")
    return made


def batches(engine: MegatronEngine, step: int) -> list[Batch]:
    """This rank's rows of the two micro-batches of a step."""
    share = NUM_ROWS // engine.data_parallel_size
    mine = slice(engine.data_parallel_rank * share, (engine.data_parallel_rank + 1) * share)
    return [collate(samples(step, number)[mine], pad_id=0, tile_size=TILE_SIZE) for number in range(2)]


def start(engine_config: dict[str, Any]) -> tuple[MegatronEngine, list[torch.nn.Module]]:
    engine, chunks = build_tiny(engine_config, TRAINABLE, STAGE1)
    engine.build_optimizer(OptimizerSettings(lr=1e-2, clip_grad=1.0, adam_eps=1e-4))
    return engine, chunks


def train(engine_config: dict[str, Any]) -> tuple[Outcome, list[dict[str, float]], float]:
    """On ranks: three steps, then a validation loss."""
    engine, chunks = start(engine_config)
    outcome, terms = Outcome(), []
    for step in range(3):
        result = engine.train_step(batches(engine, step))
        outcome.losses.append(result.loss)
        outcome.grad_norms.append(result.grad_norm)
        terms.append(dict(result.loss_terms))
    outcome.shards = gradient_shards(chunks)
    evaluated = engine.evaluate(batches(engine, 7))
    assert sum(evaluated.mean_terms().values()) == pytest.approx(evaluated.mean(), rel=1e-6)
    assert all(term > 0.0 for term in evaluated.terms.values())
    return outcome, terms, evaluated.mean()


@pytest.fixture(scope="module")
def one_rank() -> tuple[Outcome, list[dict[str, float]], float]:
    [found] = run_ranks(train, 1, ONE)
    return found


def test_the_loss_is_the_sum_of_three(one_rank: tuple[Outcome, list[dict[str, float]], float]) -> None:
    outcome, terms, _ = one_rank
    for loss, parts in zip(outcome.losses, terms, strict=True):
        assert set(parts) == {"caption", "contrast", "matching"}
        assert all(part > 0.1 for part in parts.values())
        assert loss == pytest.approx(sum(parts.values()), rel=1e-6)


@pytest.mark.parametrize(
    "engine_config",
    [ONE, {}, {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}],
    ids=["dp2", "dp2 distributed optimizer", "tp2", "tp2 sequence parallel"],
)
def test_two_ranks_are_one(
    engine_config: dict[str, Any], one_rank: tuple[Outcome, list[dict[str, float]], float]
) -> None:
    expected, expected_terms, expected_validation = one_rank
    found = run_ranks(train, 2, engine_config)
    for outcome, terms, validation in found:
        # Measured worst (sums in another order): losses 1.8e-7, their terms 6.3e-7, norms 2.0e-6, all relative.
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
        assert terms == [pytest.approx(one, rel=1e-5) for one in expected_terms]
        assert validation == pytest.approx(expected_validation, rel=1e-5)
    if engine_config != {}:  # whole gradients are on each rank
        wanted, gradients = assemble([expected]), assemble([outcome for outcome, _, _ in found])
        assert gradients.keys() == wanted.keys()
        for key, values in wanted.items():
            # Measured worst: 2.2e-5 of the largest gradient of a tensor, at the third step.
            scale = max(1e-3, float(np.abs(values).max()))
            np.testing.assert_allclose(gradients[key], values, rtol=0, atol=1e-4 * scale, err_msg=key)


def keep(engine_config: dict[str, Any], folder: Path | None, first: int, last: int) -> list[float]:
    """On ranks: train the steps ``first`` to ``last``, from what the folder holds unless it is the beginning."""
    engine, _ = start(engine_config)
    if first:
        assert folder is not None
        load_checkpoint(folder, engine, with_optimizer=True)
    losses = [engine.train_step(batches(engine, step)).loss for step in range(first, last)]
    if folder is not None and not first:
        save_checkpoint(folder, last, engine)
    return losses


def test_a_resumed_run_has_the_same_losses(tmp_path: Path) -> None:
    """To the bit: the draws of negatives go on where they were. And under another layout."""
    [through] = run_ranks(keep, 1, ONE, None, 0, 4)
    [before] = run_ranks(keep, 1, ONE, tmp_path, 0, 2)
    [behind] = run_ranks(keep, 1, ONE, tmp_path, 2, 4)
    assert before + behind == through
    found, _ = run_ranks(keep, 2, ONE, tmp_path, 2, 4)
    assert found == pytest.approx(behind, rel=1e-5)  # measured worst: 3e-8


def start_stage2(folder: Path) -> tuple[dict[str, bool], tuple[str, ...], tuple[str, ...]]:
    """On a rank: build stage 2 anew and load stage 1 into it; say which weights moved."""
    engine, chunks = build_tiny(ONE, ("connector",), STAGE2)
    before = {name: weight.detach().clone() for name, weight in chunks[0].named_parameters()}
    loaded = load_checkpoint(folder, engine, with_optimizer=False, allow_missing_parts=PARTS)
    moved = {name: not torch.equal(weight, before[name]) for name, weight in chunks[0].named_parameters()}
    return moved, loaded.missing, loaded.unexpected


def test_stage_2_takes_the_queries_side(tmp_path: Path) -> None:
    run_ranks(keep, 1, ONE, tmp_path, 0, 2)
    [(moved, missing, left)] = run_ranks(start_stage2, 1, tmp_path)
    taken = {name for name, has_moved in moved.items() if has_moved}
    # a key's bias gets no gradient but rounding; features are normalised, so some of the encoder's may stay, too
    assert {"connector.queries", "connector.layers.2.query_ffn.down.weight"} <= taken
    assert not any(name.startswith(("language.", "connector.projection.")) for name in taken)
    assert {key for key in missing if not key.startswith("language.")} == {
        "connector.projection.weight",
        "connector.projection.bias",
    }
    assert all(key.startswith("text.") or ".text_ffn." in key for key in left)
    assert {"text.word_embeddings", "connector.layers.0.text_ffn.up.weight"} <= set(left)


def load_strictly(folder: Path) -> None:
    engine, _ = build_tiny(ONE, ("connector",), STAGE2)
    load_checkpoint(folder, engine, with_optimizer=False)


def test_a_stage_2_is_not_a_stage_1(tmp_path: Path) -> None:
    run_ranks(keep, 1, ONE, tmp_path, 0, 1)
    with pytest.raises(RankError, match="does not fit the model"):
        run_ranks(load_strictly, 1, tmp_path)


def train_on_one_pair(engine_config: dict[str, Any]) -> float:
    engine, _ = start(engine_config)
    pair: list[Sample | SkippedSample] = [samples(0, 0)[0], SkippedSample("made", "image_unreadable", "for the test")]
    batch = collate(pair if engine.data_parallel_rank == 0 else [pair[1]] * 2, pad_id=0, tile_size=TILE_SIZE)
    loss = engine.evaluate([batch]).mean()  # validation may end with a lone pair
    assert 0.0 < loss < 20.0
    engine.train_step([batch])
    return loss


def test_one_pair_alone_is_an_error() -> None:
    with pytest.raises(RankError, match=r"micro_batch_size=2: 1 of the 4 rows of this micro-batch .* are pairs"):
        run_ranks(train_on_one_pair, 2, ONE)
