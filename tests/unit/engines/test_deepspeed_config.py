"""What a recipe can say about the DeepSpeed engine, and what DeepSpeed is told."""

import builtins
from pathlib import Path
from typing import Any

import pydantic
import pytest

from megavlm.engines import ENGINES, AnyEngineConfig, DeepSpeedEngineConfig, MegatronEngineConfig
from megavlm.engines.deepspeed.library import import_deepspeed
from megavlm.engines.deepspeed.state import num_updates_of

ADAPTER: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(AnyEngineConfig)

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"zero_stage": 0}, r"engine.zero_stage=0: without ZeRO, DeepSpeed counts Adam's steps wrongly.*Choose 1, 2 or 3"),
    ({"zero_stage": 0, "precision": "bf16"}, r"engine.zero_stage=0: without ZeRO"),
    ({"zero_stage": 4}, r"engine.zero_stage=4: is no stage of ZeRO. Choose 1, 2 or 3"),
    ({"zero_stage": -1}, r"engine.zero_stage=-1: is no stage"),
    ({"zero_stage": 2, "offload_param": "cpu"}, r"engine.offload_param=cpu: .* zero_stage=2. Set zero_stage=3"),
    (
        {"zero_stage": 1, "offload_optimizer": "nvme", "nvme_path": "/x"},
        r"engine.offload_optimizer=nvme: needs zero_stage=3, which is 1",
    ),
    ({"zero_stage": 3, "offload_param": "nvme"}, r"engine.nvme_path=None: nvme is offloaded to. Give a folder"),
    ({"zero_stage": 3, "offload_param": "cpu", "nvme_path": "/x"}, r"engine.nvme_path=/x: nothing is offloaded there"),
    ({"zero_stage": 2, "sub_group_size": 9}, r"engine.sub_group_size=9: is of zero_stage=3, and zero_stage is 2"),
    (
        {"zero_stage": 3, "offload_param": "nvme", "nvme_path": "/x", "stage3_prefetch_bucket_size": 9},
        r"engine.stage3_prefetch_bucket_size=9: weights on nvme are not read ahead. Leave it out",
    ),
    ({"stage3_prefetch_bucket_size": 9}, r"engine.stage3_prefetch_bucket_size=9: is of zero_stage=3"),
    ({"pipeline_model_parallel_size": 2}, r"engine.pipeline_model_parallel_size=2: ZeRO is not run over pipeline"),
    ({"virtual_pipeline_model_parallel_size": 2}, r"engine.virtual_pipeline_model_parallel_size=2: ZeRO is not run"),
    ({"expert_model_parallel_size": 2}, r"engine.expert_model_parallel_size=2: experts are not run under ZeRO"),
    ({"moe_token_dispatcher_type": "allgather"}, r"engine.moe_token_dispatcher_type=allgather: experts"),
    ({"use_distributed_optimizer": False}, r"engine.use_distributed_optimizer=False: zero_stage says"),
    ({"overlap_grad_reduce": True}, r"engine.overlap_grad_reduce=True: it belongs to megatron-core"),
    ({"overlap_param_gather": True}, r"engine.overlap_param_gather=True: it belongs to megatron-core"),
    ({"precision": "fp8", "backend": "transformer_engine"}, r"engine.precision='fp8': is not run under ZeRO"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_what_cannot_be_run_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        ADAPTER.validate_python({"kind": "deepspeed", **settings})


def test_experts_are_refused() -> None:
    config = DeepSpeedEngineConfig()
    config.check_experts(None)
    with pytest.raises(ValueError, match=r"engine.kind=deepspeed: model.language.moe has num_moe_experts=4"):
        config.check_experts(4)


def test_every_kind_is_read_by_its_name() -> None:
    for kind, config_class in ENGINES.items():
        assert type(ADAPTER.validate_python({"kind": kind})) is config_class
    assert type(ADAPTER.validate_python({})) is MegatronEngineConfig  # recipes need not say it
    with pytest.raises(pydantic.ValidationError, match="megatorn"):
        ADAPTER.validate_python({"kind": "megatorn"})


def test_keys_of_the_other_engine_name_it() -> None:
    for given in ({"zero_stage": 2}, {"kind": "megatron", "offload_optimizer": "cpu"}):
        name = list(given)[-1]
        with pytest.raises(pydantic.ValidationError, match=rf"engine.{name}=.*: is of engine.kind=deepspeed. Set that"):
            ADAPTER.validate_python(given)


def test_virtual_stages_of_one_may_stay() -> None:
    DeepSpeedEngineConfig(expert_tensor_parallel_size=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_sums_in_float32(stage: int, precision: Any) -> None:
    settings = DeepSpeedEngineConfig(zero_stage=stage, precision=precision).deepspeed_settings(clip_grad=0.5)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"]["enabled"] == (precision == "bf16")
    assert settings["data_types"]["grad_accum_dtype"] == settings["communication_data_type"] == "fp32"
    assert ("stage3_max_live_parameters" in settings["zero_optimization"]) == (stage == 3)


def test_offload_is_passed_on() -> None:
    config = DeepSpeedEngineConfig(
        zero_stage=3, offload_optimizer="nvme", offload_param="cpu", nvme_path="/scratch/swap"
    )
    settings = config.deepspeed_settings(clip_grad=1.0, swap_folder=Path("/scratch/swap/mine"))["zero_optimization"]
    assert settings["offload_optimizer"]["device"] == "nvme"
    assert settings["offload_optimizer"]["nvme_path"] == "/scratch/swap/mine"
    assert settings["offload_param"]["device"] == "cpu"
    assert "nvme_path" not in settings["offload_param"]
    config = DeepSpeedEngineConfig(zero_stage=3, offload_param="nvme", nvme_path="/scratch/swap")
    settings = config.deepspeed_settings(clip_grad=1.0, swap_folder=Path("/scratch/swap/mine"), largest_share=12)
    offload = settings["zero_optimization"]["offload_param"]
    assert (offload["buffer_size"], offload["max_in_cpu"], offload["nvme_path"]) == (12, 0, "/scratch/swap/mine")


def test_answers_come_from_the_megatron_engine() -> None:
    config = DeepSpeedEngineConfig(zero_stage=3, precision="bf16", tensor_model_parallel_size=2, sequence_parallel=True)
    other = config.on_any_machine()
    assert type(other) is MegatronEngineConfig
    assert (other.precision, other.tensor_model_parallel_size, other.sequence_parallel) == ("bf16", 2, True)


def test_missing_package_is_one_line_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "deepspeed":
            raise ImportError("No module named 'deepspeed'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(ValueError, match=r"engine.kind=deepspeed: DeepSpeed is not installed .*requirements-deepspeed"):
        import_deepspeed()


@pytest.mark.parametrize(("steps", "expected"), [([3], 3), ([2, 2], 2)])
def test_number_of_updates(steps: list[int], expected: int) -> None:
    assert num_updates_of({"optimizer": {"param_groups": [{"step": step} for step in steps]}}) == expected


def test_groups_of_different_age_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer: its parameter groups have made \[1, 2\] updates"):
        num_updates_of({"optimizer": {"param_groups": [{"step": 1}, {"step": 2}]}})
