"""Building one rank of a world that does not exist."""

import pytest
import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.runtime import current_device
from megavlm.runtime.fake_world import fake_world


@pytest.mark.parametrize("use_cpu_initialization", [False, True])
def test_a_rank_of_1024_is_built_without_memory(use_cpu_initialization: bool) -> None:
    hidden_size, ffn_hidden_size, tp = 8192, 28672, 8
    with fake_world(1024, 517):
        parallel_state.initialize_model_parallel(tp, 8)
        config = TransformerConfig(
            num_layers=80,
            hidden_size=hidden_size,
            ffn_hidden_size=ffn_hidden_size,
            num_attention_heads=64,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=8,
            pipeline_dtype=torch.bfloat16,
            params_dtype=torch.bfloat16,
            bf16=True,
            add_bias_linear=False,
            gradient_accumulation_fusion=False,
            bias_dropout_fusion=False,
            use_cpu_initialization=use_cpu_initialization,
            perform_initialization=False,
        )
        # rank 517 = tp 5 of dp 0 of stage 517 // 128 = 4: neither end of the pipeline
        model = GPTModel(config, get_gpt_layer_local_spec(), 32000, 4096, pre_process=False, post_process=False)
        params = list(model.parameters())
        attention, mlp, norms = 4 * hidden_size**2 // tp, 2 * hidden_size * ffn_hidden_size // tp, 4 * hidden_size
        assert sum(param.numel() for param in params) == 10 * (attention + mlp + norms)
        assert {param.device.type for param in params} == {"meta"}

        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
        wrapped = DistributedDataParallel(config, ddp_config, Float16Module(config, model))
        settings = OptimizerConfig(
            optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
        )
        optimizer = get_megatron_optimizer(settings, [wrapped])
        main_params = [param for group in optimizer.param_groups for param in group["params"]]
        assert sum(param.numel() for param in main_params) <= -(-sum(param.numel() for param in params) // 16) + 128
    assert not torch.distributed.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    assert current_device() == torch.device("cpu")


def _fail_with_groups() -> None:
    parallel_state.initialize_model_parallel(2)
    raise ZeroDivisionError


def test_the_world_ends_with_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), fake_world(4, 1):
        _fail_with_groups()
    assert not torch.distributed.is_initialized()
    assert torch.ones(1).device.type == "cpu"
    assert parallel_state.create_group.__name__ == "create_group"


def test_rank_must_be_in_the_world() -> None:
    with pytest.raises(ValueError, match="rank=8: must lie between 0 and world_size - 1 = 7"), fake_world(8, 8):
        pass


def test_no_fake_world_inside_another() -> None:
    with (
        fake_world(8, 3),
        pytest.raises(RuntimeError, match="world_size=2: this process is already rank 3 of 8"),
        fake_world(2, 0),
    ):
        pass
