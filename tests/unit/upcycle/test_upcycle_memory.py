"""Upcycling holds one layer's experts at a time, never a model."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.upcycle import UpcycleSettings, upcycle_folder
from megavlm.upcycle.expert import ExpertWeights


def bytes_alive() -> int:
    """Bytes behind all tensors of this process that hold anything; views of the same memory count once."""
    tensors = (thing for thing in gc.get_objects() if type(thing) is Tensor)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.device.type == "cpu" and tensor.layout == torch.strided
    }
    return sum(storages.values())


def watched(
    read: Callable[[ExpertWeights, str], Tensor], before: int, peaks: list[int]
) -> Callable[[ExpertWeights, str], Tensor]:
    """Look at what is alive each time a tensor has been made."""

    def read_and_look(weights: ExpertWeights, key: str) -> Tensor:
        tensor = read(weights, key)
        peaks.append(bytes_alive() - before)
        return tensor

    return read_and_look


def test_one_layers_experts_are_alive_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        num_hidden_layers=12, hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=60
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    gc.collect()
    peaks: list[int] = []
    monkeypatch.setattr(ExpertWeights, "read", watched(ExpertWeights.read, bytes_alive(), peaks))
    made = upcycle_folder(tmp_path / "hf", tmp_path / "moe", UpcycleSettings(num_experts=8), probe=False)
    weights = CheckpointWeights(made.checkpoint)
    sizes = {key: weights.template(key).nbytes for key in weights}
    layer = sum(size for key, size in sizes.items() if ".layers.0.mlp.experts." in key)
    total = sum(sizes.values())
    # Measured: 1.0 layers' experts (a matrix of all experts and the one before it), 0.07 of the model.
    assert 0 < max(peaks) < 1.5 * layer < total / 6
