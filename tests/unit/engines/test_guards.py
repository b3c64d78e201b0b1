"""The guards by themselves; what they guard against is shown in tests/parallel/test_traps.py."""

from collections.abc import Iterator
from typing import Any

import megatron.core.optimizer
import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.engines import guards
from megavlm.engines.fused_adam import FusedAdam
from megavlm.runtime.process import process
from megavlm.runtime.seed import set_seed


def _config(**changes: Any) -> TransformerConfig:
    fields: dict[str, Any] = {"num_layers": 8, "hidden_size": 16, "num_attention_heads": 2, "add_bias_linear": False}
    fields |= {"pipeline_dtype": torch.float32, "gradient_accumulation_fusion": False, "bias_dropout_fusion": False}
    return TransformerConfig(**(fields | changes))


@pytest.mark.parametrize(("pp", "vpp", "batched"), [(2, 2, False), (2, None, True), (4, 2, True), (1, None, True)])
def test_batched_sends_are_switched_off_for_two_interleaved_stages_alone(
    pp: int, vpp: int | None, batched: bool
) -> None:
    config = _config(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp)
    guards.settle_config(config)
    assert config.batch_p2p_comm is batched


MOMENTS = {"optimizer": {"param_groups": []}, "param_state": {}, "param_state_sharding_type": "fully_reshardable"}
COMMON = {"optimizer": {"param_groups": []}}


@pytest.mark.parametrize("state", [MOMENTS, [MOMENTS, MOMENTS], {0: MOMENTS, 1: MOMENTS}])
def test_optimizer_state_with_moments_is_accepted(state: Any) -> None:
    guards.check_optimizer_state(state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (COMMON, "optimizer: 1 of 1 optimizer states hold no param_state"),
        ([MOMENTS, COMMON], "optimizer: 1 of 2 optimizer states"),
        ({0: COMMON, 1: COMMON}, "optimizer: 2 of 2 optimizer states"),
        ([], "optimizer: 0 of 0 optimizer states"),
    ],
)
def test_optimizer_state_without_moments_is_refused(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guards.check_optimizer_state(state)


def test_own_metrics_keep_their_value_and_no_graph() -> None:
    loss = torch.ones(1, requires_grad=True) * 8
    copy = guards.own_metrics({"loss": loss, "view": loss.detach()})
    with torch.no_grad():
        loss /= 4
    assert {name: value.item() for name, value in copy.items()} == {"loss": 8.0, "view": 8.0}
    assert not copy["loss"].requires_grad


@pytest.fixture
def _one_process() -> Iterator[None]:
    with process(num_threads=1):
        parallel_state.initialize_model_parallel()
        set_seed(1)
        yield


@pytest.mark.usefixtures("_one_process")
def test_experts_alone_are_marked() -> None:
    config = _config(num_layers=1, num_moe_experts=2, moe_ffn_hidden_size=16)
    model = GPTModel(config, get_gpt_layer_local_spec(num_experts=2), 32, 8)
    guards.before_wrap([model])
    marked = {name for name, param in model.named_parameters() if not getattr(param, "allreduce", True)}
    assert marked == {name for name, _ in model.named_parameters() if ".experts." in name}
    assert len(marked) == 4


@pytest.mark.skipif(guards.HAVE_TE, reason="Transformer Engine has its own optimizer")
def test_optimizer_of_megatron_is_fused_adam() -> None:
    guards.install_optimizer()
    guards.install_optimizer()
    assert megatron.core.optimizer.Adam is FusedAdam
    assert megatron.core.optimizer.distrib_optimizer.Adam is FusedAdam


@pytest.mark.skipif(guards.HAVE_TE, reason="Transformer Engine brings the names")
def test_missing_names_are_supplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(moe_utils, "te_general_gemm")
    recompute = tensor_parallel.random.CheckpointWithoutOutput
    monkeypatch.setattr(recompute.__init__, "__defaults__", (False,))
    assert recompute().fp8  # what megatron-core makes of fp8=False
    guards.supply_missing_names()
    assert moe_utils.te_general_gemm is None
    assert not recompute().fp8
