"""The timing of expert layers: what counts to which phase, and that it changes nothing."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from tiny_vlm import IMAGE_TOKEN_ID, TINY, VOCAB_SIZE, make_batch

from megavlm.benchmark.experts import DISPATCH, PHASES, time_experts
from megavlm.engines import MegatronEngineConfig
from megavlm.models.config import VLMConfig
from megavlm.models.initialization import initialize_weights
from megavlm.models.vlm import VLM
from megavlm.runtime import process

MOE = {"num_moe_experts": 4, "moe_layer_freq": 2, "moe_ffn_hidden_size": 48}
WAIT_SECONDS = 0.05


class _Slow(torch.autograd.Function):
    """Identity that takes a while, forward and three times as long backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        time.sleep(WAIT_SECONDS)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(3 * WAIT_SECONDS)
        return gradient


@pytest.fixture(params=["alltoall", "allgather"])
def model(request: pytest.FixtureRequest) -> Iterator[VLM]:
    """A tiny model on one rank, with experts in two of its four layers."""
    with process.process():
        parallel_state.initialize_model_parallel()
        config = VLMConfig.model_validate({**TINY, "language": {**TINY["language"], "moe": MOE}})
        settings = MegatronEngineConfig(moe_token_dispatcher_type=request.param).megatron_settings()
        built = VLM(config, settings, vocab_size=VOCAB_SIZE, image_token_id=IMAGE_TOKEN_ID)
        initialize_weights([built], seed=7)
        built.language.config.auxiliary_loss_scale_func = lambda: 1.0
        yield built


def loss_and_gradients(model: VLM) -> list[torch.Tensor]:
    model.zero_grad()
    losses = model(make_batch([[3], []], seed=1))
    losses.sum().backward()
    return [losses.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def test_every_phase_takes_time_and_nothing_changes(model: VLM) -> None:
    before = loss_and_gradients(model)
    waits = []
    with time_experts([model], lambda: waits.append(1)) as seconds:
        during = loss_and_gradients(model)
    # two layers, eight wrapped functions, begin and end, forward and backward; some have nothing to do backward
    assert 2 * 8 * 2 < len(waits) <= 2 * 8 * 4
    assert set(seconds) == set(PHASES)
    assert all(value > 0 for value in seconds.values())
    assert set(DISPATCH) | {"router", "experts"} == set(PHASES)
    after = loss_and_gradients(model)
    assert len(before) == len(during) == len(after) > 20
    for one, other, last in zip(before, during, after, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, last)
    assert not any("forward" in vars(module) for module in model.modules()), "nothing stays replaced"


PLACES = {"router": "router", "experts": "experts", "token_dispatch": "exchange", "combine_postprocess": "unpermute"}


@pytest.mark.parametrize("place", PLACES)
def test_a_slow_phase_is_the_one_that_is_found(model: VLM, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    for layer in layers:
        owner, name = (getattr(layer, place), "forward") if hasattr(layer, place) else (layer.token_dispatcher, place)
        fast = getattr(owner, name)

        def slow(*arguments: Any, _fast: Any = fast, **options: Any) -> Any:
            outputs = _fast(*arguments, **options)
            if isinstance(outputs, tuple):
                return (_Slow.apply(outputs[0]), *outputs[1:])
            return _Slow.apply(outputs)

        monkeypatch.setattr(owner, name, slow)
    with time_experts([model], lambda: None) as seconds:
        loss_and_gradients(model)
    least = len(layers) * 4 * WAIT_SECONDS
    assert seconds[PLACES[place]] >= least
    assert all(value < 0.75 * least for phase, value in seconds.items() if phase != PLACES[place])
