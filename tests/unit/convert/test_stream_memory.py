"""Conversion holds a few tensors at a time, never a model."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folder import tensors_of
from published import TEXT
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.convert.folder import convert_folder
from megavlm.convert.read_hf import PublishedFolder


def bytes_alive() -> int:
    """Bytes behind all tensors that are newer than the freeze; views of the same memory count once."""
    tensors = (thing for thing in gc.get_objects() if type(thing) is Tensor)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.device.type == "cpu" and tensor.layout == torch.strided
    }
    return sum(storages.values())


class Watch:
    """Looks at what is alive each time a tensor has been read."""

    def __init__(self) -> None:
        self.peak = 0

    def around(self, read: Callable[[Any, str], Tensor]) -> Callable[[Any, str], Tensor]:
        def read_and_look(weights: Any, name: str) -> Tensor:
            tensor = read(weights, name)
            self.peak = max(self.peak, bytes_alive())
            return tensor

        return read_and_look


@pytest.fixture
def freeze() -> Iterator[Callable[[], None]]:
    """Takes what there is out of sight of the collector: to walk over it at each tensor would take half a minute."""

    def collect_and_freeze() -> None:
        gc.collect()
        gc.freeze()

    yield collect_and_freeze
    gc.unfreeze()


def test_a_few_tensors_are_alive_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freeze: Callable[[], None]
) -> None:
    config = LlamaConfig(**{**TEXT, "num_hidden_layers": 12}, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    total = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "hf").values())
    freeze()
    watch = Watch()
    monkeypatch.setattr(PublishedFolder, "__getitem__", watch.around(PublishedFolder.__getitem__))
    convert_folder(tmp_path / "hf", tmp_path / "run")
    # Measured, both ways: 0.05 of the model; 1.03 if torch's writer is let write one file of all tensors.
    assert 0 < watch.peak < total / 3

    freeze()
    watch = Watch()
    monkeypatch.setattr(CheckpointWeights, "__getitem__", watch.around(CheckpointWeights.__getitem__))
    convert_folder(tmp_path / "run", tmp_path / "back")
    assert 0 < watch.peak < total / 3
