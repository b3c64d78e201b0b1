"""What is counted of routers: by hand on few tokens, and the same under every layout."""

import functools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from test_experts import LAYOUTS, MODELS, PP2, TP2_SP
from test_router import make_router
from tiny_vlm import IMAGE_TOKEN_ID, build_tiny, make_batch, mixed_batches

from megavlm.batch import Batch
from megavlm.engines import OptimizerSettings
from megavlm.models.language import LanguageConfig
from megavlm.models.moe import RouterObserver, health
from megavlm.training.router_health import Health, RouterHealth

SOURCES = ["web", "books"]
NUM_STEPS = 2


def batches_of_sources(step: int, chunk: torch.nn.Module) -> list[Batch]:
    """The tiny model's batches, rows padded on the right and of two sources."""
    batches = mixed_batches(step, chunk.route)
    for number, batch in enumerate(batches):
        rows, length = batch.tokens.shape
        if batch.row_lengths.numel() == 0:
            batch.row_lengths = torch.tensor([length - (3 * row + number + step) % 8 for row in range(rows)])
            batch.loss_mask[batch.is_padding()] = 0.0
        batch.sources = torch.tensor([(row + number) % 2 for row in range(rows)])
    return batches


def train_and_take(engine_config: dict[str, Any], model: dict[str, Any]) -> Health:
    engine, chunks = build_tiny(engine_config, model=model)
    engine.build_optimizer(OptimizerSettings(lr=1e-2, adam_eps=1e-4))
    language = LanguageConfig.model_validate(model["language"])
    routers = RouterHealth(engine, language, SOURCES, is_trained=True)
    own = slice(engine.data_parallel_rank, None, engine.data_parallel_size)
    for step in range(NUM_STEPS):
        batches = batches_of_sources(step, chunks[0])[own]
        engine.train_step(batches)
        engine.evaluate(batches)  # counts nothing
    found = routers.take(NUM_STEPS)
    assert found is not None
    assert routers.take(NUM_STEPS) is None, "what was taken is counted no more"
    whole = routers.take_loads()
    assert whole is not None
    assert torch.equal(whole.everything.choices, found.everything.choices)
    for chunk in chunks:
        kept = [module.last for module in chunk.modules() if hasattr(module, "last")]
        assert kept == [None] * len(chunk.language.router_observer.layers), "memory is held"
    return found


@functools.cache
def reference(model: str) -> Health:
    """One process, computed once for each model."""
    [found] = run_ranks(train_and_take, 1, {}, MODELS[model])
    return found


PP2_VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TESTED: list[tuple[str, int, dict[str, Any]]] = [
    ("D", 2, {}),
    ("D", *LAYOUTS["ep2"]),
    ("D", *LAYOUTS["ep2_allgather"]),
    ("D", 2, {**TP2_SP, "expert_tensor_parallel_size": 1}),
    ("D", 2, PP2),
    ("D", 2, PP2_VPP2),
    ("D", 1, FULL),
    ("D", *LAYOUTS["recompute_moe"]),
    ("D", *LAYOUTS["tp2_pp2_vpp2_ep2"]),
    ("D_sequence", 2, {**TP2_SP, **FULL}),
    ("H", *LAYOUTS["tp2_etp1"]),
    ("H", 2, PP2_VPP2),
]


@pytest.mark.parametrize(("model", "world_size", "engine"), TESTED)
def test_layout_counts_what_one_process_counts(model: str, world_size: int, engine: dict[str, Any]) -> None:
    expected = reference(model)
    for found in run_ranks(train_and_take, world_size, engine, MODELS[model]):
        assert found.layers == expected.layers
        assert [view.name for view in found.views] == ["all", "image", "text", *SOURCES]
        for ours, theirs in zip(found.views, expected.views, strict=True):
            assert ours.num_tokens == theirs.num_tokens
            assert torch.equal(ours.choices, theirs.choices)
            assert torch.equal(ours.kept, theirs.kept)
            for name in ("mean_scores", "entropy", "z_loss"):
                # worst seen: 2.1e-7 relative
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=2e-6, atol=0.0)
        assert found.losses.keys() == expected.losses.keys()
        # worst seen: 4.4e-8 relative
        np.testing.assert_allclose(list(found.losses.values()), list(expected.losses.values()), rtol=1e-6)


def batches_of_run(model: str) -> list[Batch]:
    _, [chunk] = build_tiny({}, model=MODELS[model])
    return [batch for step in range(NUM_STEPS) for batch in batches_of_sources(step, chunk)]


@pytest.mark.parametrize("model", ["D", "H"])
def test_every_token_but_padding_is_counted_once(model: str) -> None:
    found = reference(model)
    counts = dict.fromkeys(["all", "image", "text", *SOURCES], 0)
    [batches] = run_ranks(batches_of_run, 1, model)
    for batch in batches:
        for row, length in enumerate(batch.row_lengths.tolist()):
            num_images = int((batch.tokens[row, :length] == IMAGE_TOKEN_ID).sum())
            counts["all"] += length
            counts["image"] += num_images
            counts["text"] += length - num_images
            counts[SOURCES[batch.sources[row]]] += length
    assert sum(batch.tokens.numel() for batch in batches) > counts["all"], "there is no padding"
    assert {view.name: view.num_tokens for view in found.views} == counts
    for view in found.views:
        assert view.choices.sum(dim=1).tolist() == [2.0 * view.num_tokens] * len(found.layers)
        assert torch.equal(view.choices, view.kept)
    assert found.layers == {"D": (1, 3), "H": (0, 1, 2, 3)}[model]
    assert found.losses.keys() == {"load balancing loss", "z loss"}


# ---- by hand ---------------------------------------------------------------------------------------------------------

IMAGE, TEXT, PADDING = (0.5, 0.3, 0.1, 0.1), (0.6, 0.1, 0.2, 0.1), (0.1, 0.1, 0.5, 0.3)
LOG_SUM = {IMAGE: 2.0, TEXT: 1.0, PADDING: 9.0}
ROWS = [[IMAGE, IMAGE, TEXT, TEXT], [TEXT, TEXT, TEXT, PADDING]]
LANGUAGE = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2}


def hand_worked(moe: dict[str, Any]) -> Health:
    """Route the tokens above, of which each row is a source of its own."""
    moe = {"num_moe_experts": 4, "moe_router_topk": 2, **moe}
    router = make_router({}, moe)
    router.set_layer_number(1)
    router.weight.data.copy_(torch.eye(4, 8))
    observer = RouterObserver([router])
    chunk = SimpleNamespace(language=SimpleNamespace(router_observer=observer))
    engine: Any = SimpleNamespace(chunks=[chunk], sum_over_ranks=lambda numbers: numbers)
    routers = RouterHealth(engine, LanguageConfig.model_validate({**LANGUAGE, "moe": moe}), SOURCES, is_trained=True)
    batch = make_batch([[], []], seed=0, length=4)
    batch.tokens[0, :2] = IMAGE_TOKEN_ID
    batch.tokens[1, 3] = IMAGE_TOKEN_ID  # padding all the same
    batch.row_lengths, batch.sources = torch.tensor([4, 3]), torch.tensor([0, 1])
    hidden_states = torch.zeros(4, 2, 8)
    for row, tokens in enumerate(ROWS):
        for position, scores in enumerate(tokens):
            hidden_states[position, row, :4] = torch.tensor(scores).log() + LOG_SUM[scores]
    with observer.watch(observer.groups(batch, IMAGE_TOKEN_ID)):
        router(hidden_states, batch.is_padding().t())
    router(hidden_states, batch.is_padding().t())  # recomputed in the backward pass: not counted again
    found = routers.take(1)
    assert found is not None
    return found


def entropy(scores: Sequence[float]) -> float:
    """As a share of the entropy of even scores."""
    return -sum(score * math.log(score) for score in scores) / math.log(len(scores))


def test_hand_worked_case_with_capacity() -> None:
    """Room for ceil(8 tokens * 2 / 4 experts) = 4 choices in each expert, filled by the largest weights first.

    Expert 0 is chosen by all 7 real tokens and keeps 4 texts (weight 0.75 against 0.625); expert 2 by 5 texts and the
    padding, which takes one of its places; expert 1 by the images; expert 3 by the padding alone.
    """
    [found] = run_ranks(hand_worked, 1, {"moe_expert_capacity_factor": 1.0, "moe_z_loss_coeff": 0.1})
    everything, image, text, web, books = found.views
    assert [view.num_tokens for view in found.views] == [7, 2, 5, 4, 3]
    assert everything.choices.tolist() == [[7, 2, 5, 0]]
    assert everything.kept.tolist() == [[4, 2, 3, 0]]
    assert image.choices.tolist() == [[2, 2, 0, 0]]
    assert image.kept.tolist() == [[0, 2, 0, 0]]
    assert text.kept.tolist() == [[4, 0, 3, 0]]
    assert web.choices.tolist() == [[4, 2, 2, 0]]
    assert books.choices.tolist() == [[3, 0, 3, 0]]
    assert [view.num_dead.tolist() for view in found.views] == [[1], [2], [2], [1], [2]]
    exactly = functools.partial(pytest.approx, rel=1e-6)
    assert everything.load[0].tolist() == exactly([2.0, 4 / 7, 10 / 7, 0.0])
    assert [view.max_over_mean.item() for view in found.views] == exactly([2.0, 2.0, 2.0, 2.0, 2.0])
    assert [view.dropped.item() for view in (everything, image, text)] == exactly([5 / 14, 0.5, 0.3])
    assert [view.entropy.item() for view in (image, text)] == exactly([entropy(IMAGE), entropy(TEXT)])
    assert everything.entropy.item() == exactly((2 * entropy(IMAGE) + 5 * entropy(TEXT)) / 7)
    mean = [(2 * a + 5 * b) / 7 for a, b in zip(IMAGE, TEXT, strict=True)]
    assert everything.entropy_of_mean.item() == exactly(entropy(mean))
    assert [view.load_balancing_loss.item() for view in (image, text)] == exactly([1.6, 1.6])
    assert [view.z_loss.item() for view in (everything, image, text)] == exactly([13 / 7, 4.0, 1.0])
    # both passes had a gradient here, so the router's own losses came twice; with recomputation one of them has none
    balance = 4 * (0.5 * mean[0] + mean[1] / 7 + mean[2] * 5 / 14)
    assert found.losses == exactly({"load balancing loss": 2 * balance, "z loss": 2 * 13 / 7})
    assert f" z loss: {26 / 7:.6E} | router max/mean load: image 2.00 text 2.00 |" in found.log_text()
    assert " dead experts: 1 | dropped tokens: 35.71% |" in found.log_text()


def test_experts_that_are_filled_up_keep_no_more_than_was_chosen() -> None:
    moe = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    [found] = run_ranks(hand_worked, 1, moe)
    assert found.everything.kept.tolist() == [[4, 2, 3, 0]]
    assert found.losses.keys() == {"load balancing loss"}
    assert found.everything.z_loss.item() == 0.0


def count_more_sources_than_names() -> str:
    router = make_router({}, {})
    router.set_layer_number(1)
    observer = RouterObserver([router])
    observer.tell_apart(1)
    batch = make_batch([[], [1]], seed=0, length=6)
    batch.sources = torch.tensor([0, 1])
    with observer.watch(observer.groups(batch, IMAGE_TOKEN_ID)):
        router(torch.randn(6, 2, 8))
    return str(health.unpack(observer.take(), 4, 1)["tokens"].tolist())


def test_tokens_of_a_source_without_a_name_are_mistaken_for_no_other() -> None:
    assert run_ranks(count_more_sources_than_names, 1) == ["[[6.0, 0.0, 6.0]]"]
