"""LoRA's settings, and which of megatron-core's matrices holds which projection."""

from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic

from megavlm.config import Config

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

PROJECTIONS: dict[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""megatron-core's layer -> the projections that its matrix holds, in the order of its rows."""


class LoraConfig(Config):
    """LoRA of the decoder's linear layers. Names are peft's; the defaults are mPLUG-Owl's (arXiv 2304.14178)."""

    r: pydantic.PositiveInt = 8
    """Rank of what is added to a matrix."""
    lora_alpha: pydantic.PositiveFloat = 32
    """What is added is scaled by ``lora_alpha / r``."""
    lora_dropout: float = pydantic.Field(0.0, ge=0.0, lt=1.0)
    """Of the input of A, in training (mPLUG-Owl: 0.05)."""
    target_modules: list[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]] = (
        pydantic.Field(default=["q_proj", "v_proj"], min_length=1)
    )
    """Projections that are adapted."""
    layers_to_transform: Annotated[list[pydantic.NonNegativeInt], pydantic.Field(min_length=1)] | None = None
    """Decoder layers that are adapted, counted from 0; None: all."""

    @pydantic.model_validator(mode="after")
    def _names_differ(self) -> "LoraConfig":
        for name in ("target_modules", "layers_to_transform"):
            given = getattr(self, name) or []
            if twice := [value for value in given if given.count(value) > 1]:
                raise ValueError(f"model.language.lora.{name}={given}: names {twice[0]} twice. Name it once.")
        return self

    @property
    def scale(self) -> float:
        """What ``B A x`` is multiplied by."""
        return self.lora_alpha / self.r

    def adapts(self, layer: int, projection: str) -> bool:
        """Whether a projection of a decoder layer, counted from 0, is adapted."""
        in_layer = self.layers_to_transform is None or layer in self.layers_to_transform
        return in_layer and projection in self.target_modules

    def check(self, num_layers: int, layers_with_experts: Sequence[int]) -> None:
        """Check it against the decoder that it is for.

        Raises:
            ValueError: a layer is not there, or has experts, which are not adapted.
        """
        beyond = [layer for layer in self.layers_to_transform or [] if layer >= num_layers]
        if beyond:
            raise ValueError(
                f"model.language.lora.layers_to_transform={self.layers_to_transform}: names layer {beyond[0]}, and "
                f"model.language.num_layers={num_layers}, counted from 0. Leave it out."
            )
        for layer in layers_with_experts:
            if wrong := [name for name in FEED_FORWARD_PROJECTIONS if self.adapts(layer, name)]:
                raise ValueError(
                    f"model.language.lora.target_modules={self.target_modules}: layer {layer} has experts, whose "
                    f"{wrong[0]} cannot be adapted. Leave {', '.join(wrong)} out, or choose layers_to_transform."
                )
