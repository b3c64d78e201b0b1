"""Engines: wrap a model, run one step, give and take a state dict.

A kind is one file here and one row in :data:`ENGINES`.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from megavlm.engines.config import MegatronEngineConfig, OptimizerSettings
from megavlm.engines.deepspeed import DeepSpeedEngine, DeepSpeedEngineConfig
from megavlm.engines.megatron import MegatronEngine
from megavlm.engines.step import LossSums, Stage, StepResult

ENGINES: dict[str, type] = {
    "megatron": MegatronEngineConfig,
    "deepspeed": DeepSpeedEngineConfig,
}


def _megatron_unless_said(given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    if given.get("kind", "megatron") == "megatron":
        for name in given.keys() & (DeepSpeedEngineConfig.model_fields.keys() - MegatronEngineConfig.model_fields):
            raise ValueError(f"engine.{name}={given[name]}: is of engine.kind=deepspeed. Set that, or leave it out.")
    return {"kind": "megatron", **given}


AnyEngineConfig = Annotated[
    Annotated[MegatronEngineConfig | DeepSpeedEngineConfig, pydantic.Field(discriminator="kind")],
    pydantic.BeforeValidator(_megatron_unless_said),
]


def build_engine(config: MegatronEngineConfig) -> MegatronEngine:
    """Make the engine of a config: one that trains, or only answers."""
    return DeepSpeedEngine(config) if isinstance(config, DeepSpeedEngineConfig) else MegatronEngine(config)


__all__ = [
    "ENGINES",
    "AnyEngineConfig",
    "DeepSpeedEngine",
    "DeepSpeedEngineConfig",
    "LossSums",
    "MegatronEngine",
    "MegatronEngineConfig",
    "OptimizerSettings",
    "Stage",
    "StepResult",
    "build_engine",
]
