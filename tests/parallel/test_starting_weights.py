"""A model filled from the checkpoints of others: each half of a dual encoder from an encoder of its own."""

import re
from pathlib import Path
from typing import Any

import checkpoint_model
import pytest
import torch
from harness import run_ranks
from tiny_vlm import TILE_SIZE, TINY, build_tiny

from megavlm.checkpoint import save_checkpoint, start_from
from megavlm.checkpoint.layout import sharded_leaves
from megavlm.config import merge
from megavlm.models.initialization import initialize_weights
from megavlm.models.part import Trainable
from megavlm.models.taken import PretrainedConfig
from megavlm.runtime.sharding import sharding_metadata

CLIP = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "patch_size": 7}
GENERAL: dict[str, Any] = {**TINY, "vision": {"kind": "clip", "image_size": TILE_SIZE, **CLIP}}
READING: dict[str, Any] = TINY  # InternViT, whose heads are padded under tensor parallelism
DUAL: dict[str, Any] = merge(
    TINY, {"vision": {"kind": "dual", "combine": "concatenate", "encoders": [GENERAL["vision"], READING["vision"]]}}
)
DUAL["connector"] = {"kind": "shared_mlp", "mlp": {"ffn_hidden_size": 64, "bias": True, "layernorm": False}}
NARROW = merge(DUAL, {"vision": {"encoders": [GENERAL["vision"], {**READING["vision"], "ffn_hidden_size": 48}]}})
CONNECTOR = Trainable(frozenset({"connector"}))

LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {},
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}


def save(folder: Path, model: dict[str, Any], seed: int) -> None:
    engine, chunks = build_tiny({}, model=model)
    initialize_weights(chunks, seed=seed)
    save_checkpoint(folder, "release", engine, with_optimizer=False)
    checkpoint_model.leave()


def save_both(folder: Path) -> None:
    save(folder / "general", GENERAL, seed=1)
    save(folder / "reading", READING, seed=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(save_both, 1, folder)
    return folder


def sources_in(runs: Path) -> list[dict[str, Any]]:
    return [
        {"path": runs / "general", "take": {"vision.encoders.0": "vision", "language": "language"}},
        {"path": runs / "reading", "take": {"vision.encoders.1": "vision"}},
    ]


def start(layout: dict[str, Any], model: dict[str, Any], sources: list[Any], trained: Trainable = CONNECTOR) -> list:
    engine, chunks = build_tiny(layout, trained, model)
    start_from(engine, [PretrainedConfig.model_validate(source) for source in sources], trained)
    return chunks


def look(chunk: torch.nn.Module, number: int | None = None) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """What this rank's encoder (of several: the numbered one) sees, and the language model's weights."""
    generator = torch.Generator().manual_seed(5)
    tiles = torch.randint(0, 256, (3, 3, TILE_SIZE, TILE_SIZE), generator=generator, dtype=torch.uint8)
    vision = getattr(chunk, "vision", None)
    if vision is not None and number is not None:
        vision = vision.encoders[number]
    language = {name: weight.clone() for name, weight in chunk.named_parameters() if name.startswith("language.")}
    with torch.no_grad():
        return None if vision is None else vision(tiles), language


def halves_and_their_sources(runs: Path, layout: dict[str, Any]) -> None:
    """Each half sees, bit for bit, what the encoder that it came from sees under the same layout."""
    (chunk,) = start(layout, DUAL, sources_in(runs))
    halves = [look(chunk, number) for number in (0, 1)]
    with torch.no_grad():
        fresh_bias = [p for n, p in chunk.named_parameters() if n.startswith("connector.") and n.endswith("bias")]
    checkpoint_model.leave()
    for number, (name, model) in enumerate((("general", GENERAL), ("reading", READING))):
        (single,) = start(layout, model, [{"path": runs / name}])
        features, language = look(single)
        checkpoint_model.leave()
        half, held = halves[number]
        assert (features is None) == (half is None)
        if features is not None and half is not None:
            assert torch.equal(half, features)
            assert float(features.std()) > 0.1
        is_same = all(torch.equal(weight, language[key]) for key, weight in held.items())
        assert is_same == (name == "general")
    assert all(not bias.any() for bias in fresh_bias)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_half_is_the_encoder_that_it_came_from(runs: Path, layout: str) -> None:
    run_ranks(halves_and_their_sources, 1 if layout == "1" else 2, runs, LAYOUTS[layout])


def refusals(runs: Path) -> list[str]:
    general, reading = sources_in(runs)
    vision = Trainable(frozenset({"connector", "vision"}), {"vision": ["encoders.0.encoder.layers.1"]})
    wrong: list[tuple[dict[str, Any], list[Any], Trainable]] = [
        (NARROW, [general, reading], CONNECTOR),
        (DUAL, [general], CONNECTOR),
        (DUAL, [general], vision),
        (DUAL, [general, reading, {"path": runs / "general", "take": ["language"]}], CONNECTOR),
        (DUAL, [general, {**reading, "take": {"vision.encoders.1": "vision.encoders.1"}}], CONNECTOR),
        (DUAL, [general, {**reading, "take": {"vision.encoders.2": "vision"}}], CONNECTOR),
        (DUAL, [runs / "general", reading], CONNECTOR),
        (TINY, [runs / "reading", runs / "reading"], CONNECTOR),
    ]
    said = []
    for model, sources, trained in wrong:
        with pytest.raises(ValueError, match=r"\w") as caught:
            start({}, model, sources, trained)
        said.append(str(caught.value))
        checkpoint_model.leave()
    return said


def test_what_does_not_fit_is_named(runs: Path) -> None:
    expected = (
        rf"^{runs}/reading/release: vision\..*linear_fc1\.bias has shape \(64,\) in the checkpoint and \(48,\)",
        r"general holds no vision\.encoders\.1\.\S+, .*, \.\.\., so that would stay untrained .* Add it to what trains",
        r"general holds no vision\.encoders\.1\.\S+, .*so that would stay untrained",
        rf"{runs}/general and {runs}/general both give \d+ weights \(language\..*Name what to take of each: {{path: ",
        rf"^{runs}/reading/release: holds no vision\.encoders\.1, which .*take asks for; its parts are connector, lang",
        r"take: the model has no vision\.encoders\.2\. Names are those of the model's modules, as `megavlm plan",
        r"general/release: does not fit the model: .*take: \{vision\.encoders\.0: vision\}",
        r"both give \d+ weights \(connector\.",
    )
    for said, pattern in zip(run_ranks(refusals, 1, runs)[0], expected, strict=True):
        assert re.search(pattern, said), said


def fresh_half(runs: Path) -> list[str]:
    general, _ = sources_in(runs)
    with checkpoint_model.log_lines() as lines:
        start({}, DUAL, [general], Trainable(frozenset({"vision", "connector"})))
    return lines


def test_what_none_holds_starts_fresh_if_it_trains(runs: Path) -> None:
    said = "\n".join(run_ranks(fresh_half, 1, runs)[0])
    assert "general: vision.encoders.0 from its vision, language from its language" in said
    assert "weights are in none of the checkpoints and start fresh: connector." in said


def exchanged(runs: Path) -> None:
    """A dual encoder's half becomes a single encoder again."""
    engine, chunks = build_tiny({}, CONNECTOR, DUAL)
    start_from(engine, [PretrainedConfig.model_validate(source) for source in sources_in(runs)], CONNECTOR)
    save_checkpoint(runs / "both", "release", engine, with_optimizer=False)
    half, _ = look(chunks[0], 1)
    checkpoint_model.leave()
    everything = Trainable(frozenset({"connector", "language"}))
    (chunk,) = start({}, READING, [{"path": runs / "both", "take": {"vision": "vision.encoders.1"}}], everything)
    assert half is not None
    features, _ = look(chunk)
    assert features is not None
    assert torch.equal(features, half)
    keys = {leaf.key for leaf in sharded_leaves(chunk.sharded_state_dict(metadata=sharding_metadata()))}
    assert not any("encoders" in key for key in keys)


def test_a_half_becomes_an_encoder_of_its_own(runs: Path) -> None:
    run_ranks(exchanged, 1, runs)
