"""LoRA of the decoder (arXiv 2106.09685): settings, layers, and merging into dense weights."""

from megavlm.models.lora.config import ATTENTION_PROJECTIONS, FEED_FORWARD_PROJECTIONS, PROJECTIONS, LoraConfig
from megavlm.models.lora.layer import FusedRows, Lora, LoraLinear, merge_lora, unfused, with_lora

__all__ = [
    "ATTENTION_PROJECTIONS",
    "FEED_FORWARD_PROJECTIONS",
    "PROJECTIONS",
    "FusedRows",
    "Lora",
    "LoraConfig",
    "LoraLinear",
    "merge_lora",
    "unfused",
    "with_lora",
]
