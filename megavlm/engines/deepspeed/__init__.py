"""DeepSpeed's ZeRO around the modules of megatron-core."""

from megavlm.engines.deepspeed.config import DeepSpeedEngineConfig
from megavlm.engines.deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine", "DeepSpeedEngineConfig"]
