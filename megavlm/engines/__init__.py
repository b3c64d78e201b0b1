"""Engines: wrap a model, run one step, give and take a state dict.

A kind is one file here and one row in :data:`ENGINES`.
"""

from megavlm.engines.config import MegatronEngineConfig, OptimizerSettings
from megavlm.engines.megatron import MegatronEngine, Stage, StepResult

ENGINES: dict[str, type] = {
    "megatron": MegatronEngineConfig,
}

AnyEngineConfig = MegatronEngineConfig

__all__ = [
    "ENGINES",
    "AnyEngineConfig",
    "MegatronEngine",
    "MegatronEngineConfig",
    "OptimizerSettings",
    "Stage",
    "StepResult",
]
