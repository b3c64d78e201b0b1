"""The states of the random number generators of one rank, as JSON: python, numpy, torch and megatron-core's tracker."""

import base64
import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from megavlm.runtime import current_device
from megavlm.runtime.seed import set_seed


def capture_rng() -> dict[str, Any]:
    """Return the states of this rank's generators, JSON-able."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    states = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
        "tracker": {stream: _encode(state) for stream, state in tracker.items()},
    }
    if current_device().type == "cuda":
        states["cuda"] = _encode(torch.cuda.get_rng_state())
    return states


def restore_rng(states: Mapping[str, Any]) -> None:
    """Set this rank's generators to what :func:`capture_rng` returned.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it is not what :func:`capture_rng` returned.
    """
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(states["torch"]))
    if "cuda" in states:
        torch.cuda.set_rng_state(_decode(states["cuda"]))
    tensor_parallel.get_cuda_rng_tracker().set_states(
        {stream: _decode(state) for stream, state in states["tracker"].items()}
    )


def reseed_from(data: bytes) -> int:
    """Seed this rank's generators from saved states that belong to another layout. Returns the seed.

    The same bytes give the same seed, and the states of another step or run another one.
    """
    seed = int.from_bytes(hashlib.sha256(data).digest()[:4], "big") >> 1
    set_seed(seed)
    return seed


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
