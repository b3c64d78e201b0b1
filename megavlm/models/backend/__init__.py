"""Which implementation of layers a model is built from, as megatron-core layer specs.

A kind is one file here and one row in :data:`BACKENDS`: ``torch`` runs everywhere; ``transformer_engine`` has fused
kernels and FP8 on GPUs, where the package is installed; ``fp8_emulation`` is ``torch`` with linear layers that round as
FP8 does. All have the same checkpoints.
"""

import dataclasses

from megavlm.models.backend.blocks import compiled_flex_attention
from megavlm.models.backend.fp8_emulation import emulating_backend, settle_emulation, unemulated_settings
from megavlm.models.backend.spec import Backend, attention_spec, block_spec, layer_spec, mlp_spec
from megavlm.models.backend.torch import TORCH, Norm, SDPACoreAttention
from megavlm.models.backend.transformer_engine import build_backend, installed_wraps

__all__ = [
    "BACKENDS",
    "Backend",
    "Norm",
    "SDPACoreAttention",
    "attention_spec",
    "block_spec",
    "compiled_flex_attention",
    "find_backend",
    "layer_spec",
    "mlp_spec",
    "settle_emulation",
    "unemulated_settings",
]

BACKENDS: dict[str, Backend] = {
    "torch": TORCH,
    "fp8_emulation": dataclasses.replace(TORCH, emulating=emulating_backend),
}

_WRAPS = installed_wraps()
if _WRAPS is not None:
    BACKENDS["transformer_engine"] = build_backend(_WRAPS)


def find_backend(name: str) -> Backend:
    """Return a backend.

    Raises:
        ValueError: it is not installed on this machine.
    """
    if name not in BACKENDS:
        raise ValueError(
            f"engine.backend={name}: there is only {', '.join(BACKENDS)} here; it needs a CUDA GPU and Transformer "
            "Engine. Install it (pip install --no-build-isolation -r requirements-gpu.txt; `megavlm doctor` says what "
            "is missing), or set engine.backend=torch."
        )
    return BACKENDS[name]
