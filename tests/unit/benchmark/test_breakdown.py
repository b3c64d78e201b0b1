"""The parts of a step: what counts to which, and that looking changes nothing."""

import time
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from tiny_vlm import ALL_PARTS, TINY, H, X, build_tiny, mixed_batches
from torch.distributed import ProcessGroup, Work

from megavlm.benchmark import timeline as timeline_module
from megavlm.benchmark.breakdown import LABELS, label_steps
from megavlm.benchmark.timeline import Timeline
from megavlm.engines import MegatronEngine, OptimizerSettings
from megavlm.runtime import process
from megavlm.runtime.activity import ACTIVITY

MODELS = {"D": TINY, "X": X, "H": H}
Built = tuple[MegatronEngine, Any]


class _Slow(torch.autograd.Function):
    """Identity that takes a second forward and two backward, by the timeline's clock."""

    @staticmethod
    def forward(ctx: Any, clock: list[float], tensor: torch.Tensor) -> torch.Tensor:
        clock[0] += 1.0
        ctx.clock = clock
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        ctx.clock[0] += 2.0
        return None, gradient


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The timeline's time; it moves only where a test says so."""
    now = [0.0]
    monkeypatch.setattr(timeline_module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


@pytest.fixture
def one_rank() -> Iterator[None]:
    with process.process():
        yield


def built(kind: str, trainable: tuple[str, ...] = ALL_PARTS, **engine: Any) -> Built:
    engine_and_chunks = build_tiny({"precision": "fp32", **engine}, trainable, MODELS[kind])
    engine_and_chunks[0].build_optimizer(OptimizerSettings(lr=1e-2, clip_grad=0.5))
    return engine_and_chunks


def step(engine: MegatronEngine, chunks: Any, number: int) -> tuple[float, float]:
    result = engine.train_step(mixed_batches(number, chunks[0].route))
    return result.loss, result.grad_norm


def seconds_of_a_step(engine: MegatronEngine, chunks: Any) -> dict[str, float]:
    timeline = Timeline(engine.device)
    with label_steps(engine, timeline):
        timeline.start()
        step(engine, chunks, 1)
        return {label: seconds for label, seconds in timeline.stop().items() if seconds}


@pytest.mark.parametrize("kind", MODELS)
def test_parts_add_up_and_nothing_changes(kind: str, one_rank: None) -> None:
    owners = {schedules: "backward_step", ProcessGroup: "allreduce", Work: "wait"}
    before = {owner: getattr(owner, name) for owner, name in owners.items()}
    engine, chunks = built(kind)
    plain = [step(engine, chunks, number) for number in range(3)]
    process.stop()

    process.start()
    engine, chunks = built(kind)
    timeline = Timeline(engine.device)
    with label_steps(engine, timeline):
        looked_at = [step(engine, chunks, 0)]  # while the timeline does not run
        timeline.start()
        start = time.perf_counter()
        looked_at.append(step(engine, chunks, 1))
        took = time.perf_counter() - start
        seconds = timeline.stop()
    looked_at.append(step(engine, chunks, 2))

    assert looked_at == plain
    # there is no gap between the labels; measured difference of the two clocks: below 0.1 ms
    assert seconds.total() == pytest.approx(took, abs=0.005)
    expected = {"vision", "connector", "language", "optimizer", "communication", "other"}
    assert set(seconds) == expected | (set() if kind == "D" else {"cross_attention"})
    assert set(seconds) <= set(LABELS)
    assert all(getattr(owner, name) is before[owner] for owner, name in owners.items())
    assert "begin" not in vars(ACTIVITY)
    assert not any("forward" in vars(module) for chunk in chunks for module in chunk.modules())


def slow_places(model: Any) -> dict[str, tuple[list[Any], str]]:
    """Place -> modules whose first output is made slow, and the label that must have the time."""
    layers = model.language.decoder.layers
    crossed = next(layer.cross_attention for layer in layers if hasattr(layer.cross_attention, "linear_q"))
    return {
        "vision layer": ([model.vision.encoder.layers[1].mlp], "vision"),
        "connector": ([model.connector], "connector"),
        "decoder layer": ([layer.mlp for layer in layers], "language"),
        "output layer": ([model.language.output_layer], "language"),
        "embedding": ([model.language.embedding.word_embeddings], "language"),
        "cross-attention": ([crossed.linear_q], "cross_attention"),
        "context of cross-attention": ([crossed.linear_kv], "cross_attention"),
        "norm of the context": ([model.context_layernorm], "cross_attention"),
    }


PLACES = [
    "vision layer",
    "connector",
    "decoder layer",
    "output layer",
    "embedding",
    "cross-attention",
    "context of cross-attention",
    "norm of the context",
]
RECOMPUTED = ("vision layer", "decoder layer", "cross-attention", "context of cross-attention")
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("engine_config", [{}, RECOMPUTE], ids=["plain", "recompute"])
@pytest.mark.parametrize("place", PLACES)
def test_a_slow_part_is_the_one_that_is_found(
    place: str, engine_config: dict[str, Any], one_rank: None, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, chunks = built("H", **engine_config)
    modules, label = slow_places(chunks[0])[place]
    calls = []
    for module in modules:
        fast = module.forward

        def slow(*arguments: Any, _fast: Any = fast, **options: Any) -> Any:
            outputs = _fast(*arguments, **options)
            calls.append(torch.is_grad_enabled())
            if isinstance(outputs, tuple):
                return (_Slow.apply(clock, outputs[0]), *outputs[1:])
            return _Slow.apply(clock, outputs)

        monkeypatch.setattr(module, "forward", slow)
    seconds = seconds_of_a_step(engine, chunks)
    assert seconds == {label: clock[0]}
    assert clock[0] > len(calls) >= 4 * len(modules), "backward too"
    assert all(calls) == (not engine_config or place not in RECOMPUTED)  # their first call is without gradients


def test_a_slow_collective_is_communication_and_not_the_part_it_is_in(
    one_rank: None, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, chunks = built("D")
    wait = Work.wait

    def slow(*arguments: Any) -> Any:
        clock[0] += 1.0
        return wait(*arguments)

    mlp = chunks[0].language.decoder.layers[0].mlp
    fast, calls = mlp.forward, []

    def with_collective(*arguments: Any, **options: Any) -> Any:
        group = parallel_state.get_data_parallel_group()
        work = torch.distributed.all_reduce(torch.ones(1), group=group, async_op=True)
        clock[0] += 10.0  # beside a computation
        calls.append(work.wait())
        return fast(*arguments, **options)

    monkeypatch.setattr(mlp, "forward", with_collective)
    plain = dict(seconds_of_a_step(engine, chunks))
    assert (plain, len(calls)) == ({"language": 40.0}, 4)
    monkeypatch.setattr(Work, "wait", slow)
    seconds = seconds_of_a_step(engine, chunks)
    assert seconds["language"] == 40.0
    assert seconds["communication"] >= 4.0
    assert set(seconds) == {"language", "communication"}


def test_a_slow_update_is_the_optimizers(one_rank: None, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, chunks = built("D", trainable=("connector", "language"))
    update = engine.optimizer.step_with_ready_grads

    def slow() -> Any:
        clock[0] += 1.0
        return update()

    monkeypatch.setattr(engine.optimizer, "step_with_ready_grads", slow)
    assert seconds_of_a_step(engine, chunks) == {"optimizer": 1.0}


def test_a_frozen_encoder_counts_forward(one_rank: None, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, chunks = built("D", trainable=("connector", "language"))
    encode, calls = chunks[0].vision.encoder.forward, []

    def slow(*arguments: Any, **options: Any) -> Any:
        clock[0] += 1.0
        calls.append(torch.is_grad_enabled())
        return encode(*arguments, **options)

    monkeypatch.setattr(chunks[0].vision.encoder, "forward", slow)
    assert seconds_of_a_step(engine, chunks) == {"vision": float(len(calls))}
    assert not any(calls)
