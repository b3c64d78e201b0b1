"""Generation with a key-value cache gives the tokens of generation without, under every layout."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from tiny_vlm import ADDING_H, ALL_PARTS, FLAMINGO, TILE_SIZE, TINY, VOCAB_SIZE, H, X, build_tiny, make_sample

from megavlm.data import Sample
from megavlm.engines import MegatronEngineConfig
from megavlm.inference.generate import _Cached, _Whole, generate
from megavlm.inference.sampling import Sampling
from megavlm.models.config import VLMConfig

MODELS = {"D": TINY, "X": X, "H": H, "H_adding": ADDING_H, "Flamingo": FLAMINGO}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=3)}
STOP = 7
TESTED = [
    *((model, layout, "greedy") for model in MODELS for layout in ("1", "tp2_pp2")),
    ("D", "tp2", "greedy"),
    ("D", "pp2", "greedy"),
    ("D", "1", "sampled"),
    ("X", "pp2", "sampled"),
]


def parts_of(engine_config: dict[str, Any], model: dict[str, Any]) -> Any:
    """What generation asks of a run's parts."""
    engine, _ = build_tiny(engine_config, ALL_PARTS, model)
    return SimpleNamespace(
        engine=engine,
        recipe=SimpleNamespace(engine=MegatronEngineConfig(**engine_config)),
        tokenizer=SimpleNamespace(pad_id=0),
        processor=SimpleNamespace(
            tile_size=TILE_SIZE,
            route=VLMConfig.model_validate(model).fusion.tile_route,
            stop_token_ids=frozenset([STOP]),
            stop_text="",
        ),
        vocab_size=VOCAB_SIZE,
        pad_multiple=1,
    )


def prompts_for(parts: Any) -> list[Sample]:
    """Prompts of different lengths: of text, with one image, with several."""
    generator = torch.Generator().manual_seed(11)
    images: list[list[int]] = [[], [3], [1, 2], [4]]
    return [
        make_sample(tiles, generator, length, parts.processor.route)
        for tiles, length in zip(images, (5, 12, 20, 9), strict=True)
    ]


def answers(engine_config: dict[str, Any], model: dict[str, Any], sampling: Sampling) -> list[list[list[int]]]:
    """With the cache, without it, and each prompt alone with it."""
    parts = parts_of(engine_config, model)
    prompts = prompts_for(parts)
    cached = generate(parts, prompts, max_new_tokens=8, sampling=sampling)
    whole = generate(parts, prompts, max_new_tokens=8, sampling=sampling, use_cache=False)
    alone = [generate(parts, [prompt], max_new_tokens=8, sampling=sampling)[0] for prompt in prompts]
    return [cached, whole, alone]


@pytest.mark.parametrize(("model", "layout", "sampling"), TESTED)
def test_cached_tokens_are_those_of_whole_sequences(model: str, layout: str, sampling: str) -> None:
    world_size, engine = LAYOUTS[layout]
    outcomes = run_ranks(answers, world_size, engine, MODELS[model], SAMPLINGS[sampling])
    cached, whole, alone = outcomes[0]
    assert cached == whole
    if sampling == "greedy":
        assert alone == cached
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert len({tuple(answer) for answer in cached}) > 1, "every prompt gets the same answer"


def logits_of_steps(model: dict[str, Any]) -> list[float]:
    """Largest difference between cached and whole logits, step by step, on given tokens."""
    parts = parts_of({}, model)
    prompts = prompts_for(parts)
    cached, whole = _Cached(parts, prompts, 6), _Whole(parts, prompts)
    differences, tokens = [], None
    for step in range(6):
        differences.append(float((cached.logits(tokens) - whole.logits(tokens)).abs().max()))
        tokens = [step + row + 1 for row in range(len(prompts))]
    return differences


@pytest.mark.parametrize("model", MODELS)
def test_cached_logits(model: str) -> None:
    [differences] = run_ranks(logits_of_steps, 1, MODELS[model])
    # worst seen: 6.9e-7
    np.testing.assert_allclose(differences, 0.0, atol=1e-5)


def refused(engine_config: dict[str, Any]) -> str:
    parts = parts_of(engine_config, TINY)
    with pytest.raises(ValueError, match="one token at a time") as caught:
        generate(parts, prompts_for(parts), max_new_tokens=1)
    return str(caught.value)


def test_sequence_parallel_layouts_are_refused() -> None:
    messages = run_ranks(refused, 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True})
    assert messages[0].startswith("engine.sequence_parallel=True")
