"""A model of fused layers reads and writes the checkpoints of the torch layers and trains as it does.

The fused layers are Transformer Engine's in arguments, parameters and checkpoint entries, computed by torch.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from tiny_vlm import FLAMINGO, IMAGE_TOKEN_ID, TINY, VOCAB_SIZE, H, mixed_batches, open_gates

from megavlm.checkpoint import load_checkpoint, save_checkpoint
from megavlm.engines import MegatronEngine, MegatronEngineConfig, OptimizerSettings
from megavlm.models.backend import BACKENDS, Norm, SDPACoreAttention
from megavlm.models.backend.transformer_engine import Wraps, build_backend
from megavlm.models.config import VLMConfig
from megavlm.models.initialization import initialize_weights
from megavlm.models.vlm import VLM
from megavlm.runtime.seed import set_seed

EXPERTS = {**TINY, "language": {**TINY["language"], "moe": {"num_moe_experts": 4, "moe_layer_freq": 2}}}
MODELS = {"D": TINY, "H": H, "experts": EXPERTS, "Flamingo": FLAMINGO}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
NUM_STEPS = 2


class PackagedColumnLinear(ColumnParallelLinear):
    """Insists on what the package insists on."""

    def __init__(self, *sizes: int, gather_output: bool, skip_bias_add: bool, is_expert: bool, **kwargs: Any) -> None:
        assert not gather_output
        super().__init__(*sizes, gather_output=False, skip_bias_add=skip_bias_add, is_expert=is_expert, **kwargs)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def get_extra_state(self) -> torch.Tensor:
        raise AssertionError("would be pickled")


class PackagedRowLinear(RowParallelLinear):
    def __init__(self, *sizes: int, input_is_parallel: bool, is_expert: bool, **kwargs: Any) -> None:
        assert input_is_parallel
        super().__init__(*sizes, input_is_parallel=True, is_expert=is_expert, **kwargs)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=1, stride=1)

    def get_extra_state(self) -> torch.Tensor:
        raise AssertionError("would be pickled")


class PackagedNormLinear(PackagedColumnLinear):
    """The norm's weights lie beside the linear layer's, under names of their own."""

    def __init__(self, *sizes: int, config: Any, **kwargs: Any) -> None:
        super().__init__(*sizes, config=config, **kwargs)
        norm = Norm(config, sizes[0], config.layernorm_epsilon)
        self.layer_norm_weight, self.layer_norm_bias = norm.weight, norm.bias
        del self.layer_norm_weight.constant
        object.__setattr__(self, "_norm", norm)  # no submodule

    def forward(self, states: torch.Tensor, *args: Any) -> Any:
        norm = self._norm
        norm.weight, norm.bias = self.layer_norm_weight, self.layer_norm_bias
        return super().forward(norm(states), *args)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class PackagedNorm:
    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
        norm = Norm(config, hidden_size, eps)
        del norm.weight.constant
        return norm


class PackagedAttention(SDPACoreAttention):
    def forward(self, query: Any, key: Any, value: Any, mask: None, attn_mask_type: AttnMaskType) -> torch.Tensor:
        assert mask is None
        return super().forward(query, key, value, None, attn_mask_type)


WRAPS = Wraps(PackagedNorm, PackagedColumnLinear, PackagedNormLinear, PackagedRowLinear, PackagedAttention, None, None)


def build(backend: str, layout: dict[str, Any], model: dict[str, Any]) -> MegatronEngine:
    BACKENDS["transformer_engine"] = build_backend(WRAPS)
    engine = MegatronEngine(MegatronEngineConfig(**layout, backend=backend))
    engine.start()
    set_seed(3)
    settings = {**engine.config.megatron_settings(), "apply_rope_fusion": False}  # the package's kernel
    config = VLMConfig.model_validate(model)
    chunks: list[Any] = [
        VLM(
            config,
            settings,
            vocab_size=VOCAB_SIZE,
            image_token_id=IMAGE_TOKEN_ID,
            pre_process=stage.pre_process,
            post_process=stage.post_process,
            vp_stage=stage.vp_stage,
            backend=backend,
        )
        for stage in engine.stages()
    ]
    del BACKENDS["transformer_engine"]  # this process serves other tests too
    initialize_weights(chunks, seed=7)
    open_gates(chunks)
    engine.wrap(chunks)
    engine.build_optimizer(OptimizerSettings(lr=1e-2, adam_eps=1e-4))
    return engine


def steps(engine: MegatronEngine, first: int) -> list[float]:
    found = []
    for step in range(first, first + NUM_STEPS):
        batches = mixed_batches(step, engine.chunks[0].route)
        result = engine.train_step(batches[engine.data_parallel_rank :: engine.data_parallel_size])
        found += [result.loss, result.grad_norm]
    return found


def train_and_save(folder: Path, backend: str, layout: dict[str, Any], model: dict[str, Any]) -> list[list[float]]:
    engine = build(backend, layout, model)
    before = steps(engine, 0)
    save_checkpoint(folder, 1, engine)
    return [before, steps(engine, NUM_STEPS)]


def load_and_train(folder: Path, backend: str, layout: dict[str, Any], model: dict[str, Any]) -> list[float]:
    engine = build(backend, layout, model)
    loaded = load_checkpoint(folder, engine, with_optimizer=True)
    assert (loaded.missing, loaded.unexpected) == ((), ())
    return steps(engine, NUM_STEPS)


@pytest.mark.parametrize("model", MODELS)
def test_fused_layers_start_and_train_as_torch_layers_and_go_on_from_them(tmp_path: Path, model: str) -> None:
    tree = MODELS[model]
    [expected] = run_ranks(train_and_save, 1, tmp_path / "torch", "torch", {}, tree)
    [fused, _] = run_ranks(train_and_save, 2, tmp_path / "fused", "transformer_engine", TP2_SP, tree)
    # measured on all models: 4.9e-7
    for found, wanted in zip(fused, expected, strict=True):
        assert found == pytest.approx(wanted, rel=5e-6)
    [resumed, _] = run_ranks(load_and_train, 2, tmp_path / "torch", "transformer_engine", TP2_SP, tree)
    assert resumed == pytest.approx(expected[1], rel=5e-6)
    [back] = run_ranks(load_and_train, 1, tmp_path / "fused", "torch", {}, tree)
    assert back == pytest.approx(expected[1], rel=5e-6)
