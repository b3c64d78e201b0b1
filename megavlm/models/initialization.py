"""Fresh weights that depend on the seed and on a parameter's checkpoint key only.

Every layout of a model therefore starts from the same weights, and curves of different layouts can be compared.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.models.weights import WeightSlot, count_unreachable, fill_weights

_RESIDUAL_WRITERS = ("linear_proj.weight", "linear_fc2.weight")
"""Layers whose output is added to the residual stream of a transformer."""


def initialize_weights(chunks: Sequence[MegatronModule], seed: int) -> None:
    """Draw all weights of this rank's (unwrapped) model chunks, in place.

    Weights are normal with their part's ``init_method_std`` (the residual writers of a transformer divided by the
    square root of twice its depth, as in GPT-2 and Megatron-LM), biases zero, norms and scales at their constants.
    Each tensor is drawn whole, in float32 on the CPU, by a generator of its own.
    """
    parts = {name: part for chunk in chunks for name, part in chunk.named_children()}

    def draw(slot: WeightSlot) -> Tensor:
        if slot.constant is not None:
            return torch.full(slot.shape, slot.constant)
        if slot.key.endswith(".bias"):
            return torch.zeros(slot.shape)
        part = _config_of(parts, slot.key)
        std = part.init_method_std
        if slot.key.endswith(_RESIDUAL_WRITERS) and ".layers." in slot.key:
            std /= math.sqrt(2 * part.num_layers)
        return torch.randn(slot.shape, generator=generator_of(seed, slot.key)) * std

    fill_weights(chunks, draw)
    assert count_unreachable(chunks) == 0, "a module keeps parameters out of its sharded state dict"


def _config_of(parts: dict[str, torch.nn.Module], key: str) -> TransformerConfig:
    """megatron-core's config of the part that a key belongs to: of one of several encoders its own."""
    words = key.split(".")
    if words[:2] == ["vision", "encoders"]:
        return parts["vision"].get_submodule(".".join(words[1:3])).config
    return parts[words[0]].config


def generator_of(seed: int, key: str) -> torch.Generator:
    """Return the generator that a fresh tensor of a checkpoint key is drawn by."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
