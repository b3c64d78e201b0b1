"""In which precision each part of a model computes."""

from collections.abc import Collection, Mapping
from typing import Any

from megavlm.models.backend import Backend, find_backend, unemulated_settings

FP8_PARTS = ("vision", "connector", "language", "cross_attention", "experts")


def part_precision(
    megatron_settings: Mapping[str, Any], backend: str, bf16_parts: Collection[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Backend]]:
    """The settings of the parts with a config of their own, and the layers of all parts."""
    layers = find_backend(backend)
    if layers.emulating is not None and megatron_settings.get("fp8") is not None:
        emulating = layers.emulating(megatron_settings)
        plain = unemulated_settings(megatron_settings, has_experts="experts" not in bf16_parts)
        return (
            {part: dict(plain) for part in ("vision", "connector", "language")},
            {part: layers if part in bf16_parts else emulating for part in FP8_PARTS},
        )
    in_bf16 = {"fp8": None, "first_last_layers_bf16": False}
    settings = {
        part: {**megatron_settings, **(in_bf16 if part in bf16_parts else {})}
        for part in ("vision", "connector", "language")
    }
    settings["connector"]["first_last_layers_bf16"] = False  # it is no stack of layers
    # a part with a config of its own is told by that
    inside = {part: layers.unquantized if part in bf16_parts else layers for part in ("cross_attention", "experts")}
    return settings, dict.fromkeys(FP8_PARTS, layers) | inside
