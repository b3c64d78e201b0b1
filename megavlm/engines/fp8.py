"""FP8 of Transformer Engine: what a recipe can say about it, what shapes and chips it asks for.

Master weights, gradients and the optimizer stay as in a bfloat16 run; the matrix products of linear layers are FP8.
Attention, norms, embedding, output layer and loss are never FP8.
"""

import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import pydantic
import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config import Config

Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
Precision = Literal["fp8", "bf16"]

OLDEST_TRANSFORMER_ENGINE = (2, 9)
"""What megatron-core 0.16.1 asks for; every recipe here is in it."""


@dataclass(frozen=True)
class _Chips:
    """What a recipe runs on."""

    least: tuple[int, int]
    """Compute capability."""
    below: tuple[int, int] | None
    """Compute capability that does not have it (again)."""
    least_cuda: tuple[int, int]
    names: str


_CHIPS: dict[str, _Chips] = {
    "delayed": _Chips((8, 9), None, (12, 1), "Ada, Hopper and Blackwell"),
    "tensorwise": _Chips((8, 9), None, (12, 1), "Ada, Hopper and Blackwell"),
    "blockwise": _Chips((9, 0), None, (12, 9), "Hopper and Blackwell with CUDA 12.9"),
    "mxfp8": _Chips((10, 0), (12, 0), (12, 8), "Blackwell of data centres (B200, GB200)"),
}
"""As ``transformer_engine.pytorch.quantization`` 2.11 checks it."""


class Fp8Config(Config):
    """How FP8 is scaled and which parts compute in it. Names are megatron-core's without ``fp8_``."""

    recipe: Fp8Recipe = "tensorwise"
    """``tensorwise``: one scale a tensor, from the tensor itself. ``delayed``: one from the maxima of steps before.
    ``blockwise``: one for 128 values, or 128 x 128 of a weight. ``mxfp8``: one for 32 values."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """``hybrid``: gradients are E5M2, all else E4M3. ``blockwise`` and ``mxfp8`` do well with ``e4m3`` alone."""
    margin: pydantic.NonNegativeInt = 0
    """Powers of two below the largest value that a delayed scale stays."""
    amax_history_len: pydantic.PositiveInt = 1024
    """Steps whose maxima a delayed scale looks at."""
    amax_compute_algo: Literal["most_recent", "max"] = "max"
    """Which of them it takes."""
    num_layers_at_start_in_bf16: pydantic.NonNegativeInt = 0
    """First decoder layers that stay in bfloat16; not with ``delayed``."""
    num_layers_at_end_in_bf16: pydantic.NonNegativeInt = 0
    """Last decoder layers that stay in bfloat16; not with ``delayed``."""
    vision: Precision = "bf16"
    """Encoders with a class token, or an odd grid, have no legal number of positions for FP8."""
    connector: Precision = "bf16"
    language: Precision = "fp8"
    cross_attention: Precision = "fp8"
    """Inside the decoder's layers, so FP8 only with ``language: fp8``; ``bf16`` where that is ``bf16``."""
    experts: Precision = "fp8"
    """As ``cross_attention``."""

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> "Fp8Config":
        inside = [part for part in ("cross_attention", "experts") if part in self.model_fields_set]
        wrong = [part for part in inside if getattr(self, part) == "fp8" and self.language == "bf16"]
        if wrong:
            raise ValueError(
                f"engine.fp8.{wrong[0]}='fp8': it is inside the decoder's layers, and engine.fp8.language='bf16'. Set "
                "language to fp8, or this to bf16."
            )
        if not self.fp8_parts:
            raise ValueError("engine.fp8: every part is bf16. Set engine.precision=bf16 instead.")
        if self.recipe == "delayed" and self.keeps_layers:
            raise ValueError(
                f"engine.fp8.num_layers_at_start_in_bf16={self.num_layers_at_start_in_bf16} and "
                f"num_layers_at_end_in_bf16={self.num_layers_at_end_in_bf16}: recipe='delayed' has one scaling context "
                "over all layers. Set both to 0 or choose another recipe."
            )
        return self

    @property
    def fp8_parts(self) -> tuple[str, ...]:
        """Parts that compute in FP8, where the model has them."""
        inside = ("cross_attention", "experts") if self.language == "fp8" else ()
        return tuple(part for part in ("vision", "connector", "language", *inside) if getattr(self, part) == "fp8")

    @property
    def bf16_parts(self) -> tuple[str, ...]:
        """Parts that do not."""
        parts = ("vision", "connector", "language", "cross_attention", "experts")
        return tuple(part for part in parts if part not in self.fp8_parts)

    @property
    def keeps_layers(self) -> bool:
        """Whether first or last layers stay in bfloat16."""
        return self.num_layers_at_start_in_bf16 + self.num_layers_at_end_in_bf16 > 0

    @property
    def alignment(self) -> int:
        """What the sides of every product must be a multiple of, on each rank."""
        return get_fp8_align_size(self.recipe)

    def megatron_fields(self) -> dict[str, Any]:
        """TransformerConfig arguments."""
        return {
            "fp8": self.format,
            "fp8_recipe": self.recipe,
            "fp8_margin": self.margin,
            "fp8_amax_history_len": self.amax_history_len,
            "fp8_amax_compute_algo": self.amax_compute_algo,
            "first_last_layers_bf16": self.keeps_layers,
            "num_layers_at_start_in_bf16": self.num_layers_at_start_in_bf16,
            "num_layers_at_end_in_bf16": self.num_layers_at_end_in_bf16,
            # megatron-core tells layers to quantise their weights anew only where the decoder is FP8. Others do it
            # each time; else they would go on with the weights of the first step.
            "disable_parameter_transpose_cache": self.language == "bf16",
        }


class Side(Protocol):
    """One side of the products of a part: a width of their weights, or a count of vectors."""

    @property
    def part(self) -> str:
        """Part of the model."""

    @property
    def name(self) -> str:
        """What it is, by recipe keys."""

    @property
    def size(self) -> int:
        """On one rank."""


def check_sides(config: Fp8Config, sides: Iterable[Side]) -> None:
    """Check that every side of the products of FP8 parts is legal.

    Raises:
        ValueError: some are not; names each with its number and the multiple that it must be.
    """
    wrong = [side for side in sides if side.part in config.fp8_parts and side.size % config.alignment]
    if wrong:
        lines = [f"  {side.name} is {side.size} on a rank (engine.fp8.{side.part}=fp8)" for side in wrong]
        raise ValueError(
            f"engine.fp8.recipe={config.recipe}: each of these must be a multiple of {config.alignment}:\n"
            + "\n".join(lines)
            + "\nChange the model or its split, or set the part to bf16."
        )


def pad_multiple(*, splits: int, config: Fp8Config | None) -> int:
    """What rows are padded to a multiple of: the only place that decides it.

    Tensor-parallel ranks must get equal shares of a row (``splits``), and in FP8 each share a legal number of vectors,
    because it is quantised before it is gathered. A micro-batch of several rows, packed or not, is then legal too.

    Args:
        splits: shares of a row: the tensor-parallel size under sequence parallelism, else 1.
        config: None where no part is FP8.
    """
    return splits * (config.alignment if config is not None and config.language == "fp8" else 1)


def padding_share(lengths: Sequence[int], multiple: int) -> float:
    """Share of the positions that padding to a multiple adds to rows of these lengths; 0.0 for none."""
    padded = sum(-(-length // multiple) * multiple for length in lengths)
    return 1.0 - sum(lengths) / padded if padded else 0.0


def chip_problem(recipe: str, capability: tuple[int, int], cuda: tuple[int, int]) -> str | None:
    """Say why a GPU cannot do a recipe; None if it can.

    Args:
        recipe: of FP8.
        capability: compute capability of the GPU.
        cuda: version that torch was built with.
    """
    chips = _CHIPS[recipe]
    if capability < chips.least or (chips.below is not None and capability >= chips.below):
        return f"has compute capability {capability[0]}.{capability[1]}, and {recipe} runs on {chips.names}"
    if cuda < chips.least_cuda:
        least = ".".join(map(str, chips.least_cuda))
        return f"is used with CUDA {cuda[0]}.{cuda[1]}, and {recipe} needs {least}"
    return None


def recipes_of(capability: tuple[int, int], cuda: tuple[int, int]) -> list[str]:
    """FP8 recipes that a GPU can do."""
    return [recipe for recipe in _CHIPS if chip_problem(recipe, capability, cuda) is None]


def check_machine(config: Fp8Config) -> None:
    """Check that this rank's GPU and packages can do it.

    Raises:
        ValueError: there is no GPU, it cannot do the recipe, or Transformer Engine is too old.
    """
    key = f"engine.fp8.recipe={config.recipe}"
    if not torch.cuda.is_available():
        raise ValueError(
            f"{key}: there is no CUDA GPU here. Set engine.precision=bf16, or engine.backend=fp8_emulation to see what "
            "FP8 does to the loss."
        )
    cuda = version_numbers(torch.version.cuda or "0")
    if problem := chip_problem(config.recipe, torch.cuda.get_device_capability(), cuda):
        possible = recipes_of(torch.cuda.get_device_capability(), cuda)
        choose = f"Choose one of {', '.join(possible)}." if possible else "Set engine.precision=bf16."
        raise ValueError(f"{key}: {torch.cuda.get_device_name()} {problem}. {choose}")
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        version = "(none)"
    if version_numbers(version) < OLDEST_TRANSFORMER_ENGINE:
        least = ".".join(map(str, OLDEST_TRANSFORMER_ENGINE))
        raise ValueError(
            f"{key}: Transformer Engine {version} is installed, and {least} is needed. pip install "
            "--no-build-isolation -r requirements-gpu.txt"
        )


def version_numbers(version: str) -> tuple[int, int]:
    """Major and minor number of a version; 0 where there is none."""
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    return tuple([*numbers, 0, 0][:2])  # type: ignore[return-value]


@runtime_checkable
class EmulatingLayer(Protocol):
    """A linear layer that emulates FP8 (``megavlm.models.backend.fp8_emulation``)."""

    def switch_off(self) -> None:
        """Compute in bfloat16 from now on."""

    def amaxes(self) -> torch.Tensor:
        """Largest magnitudes of what was quantised in this step; ``[0]`` where scales do not depend on steps."""

    def update_scales(self, amaxes: torch.Tensor) -> None:
        """Take the scales of the next step. ``amaxes``: those of all ranks."""


def emulating_layers(chunks: Iterable[torch.nn.Module]) -> list[EmulatingLayer]:
    """Find them, in the order of the model."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, EmulatingLayer)]


def update_scales(layers: Sequence[EmulatingLayer], device: torch.device) -> None:
    """End a step of delayed scaling: the ranks that share a pipeline stage agree on the largest magnitudes.

    The ranks are those that Transformer Engine reduces over (``FP8GlobalStateManager.reduce_and_update_fp8_tensors`` in
    the group that megatron-core gives it): tensor- and data-parallel. Experts that other ranks hold share the scales of
    the experts in the same place. Collective.
    """
    amaxes = [layer.amaxes() for layer in layers]
    sizes = [len(each) for each in amaxes]
    if not sum(sizes):
        return
    whole = torch.cat(amaxes).to(device)
    torch.distributed.all_reduce(
        whole, op=torch.distributed.ReduceOp.MAX, group=parallel_state.get_amax_reduction_group()
    )
    for layer, part in zip(layers, whole.cpu().split(sizes), strict=True):
        if len(part):
            layer.update_scales(part)


def switch_off(chunks: Sequence[torch.nn.Module]) -> None:
    """Let a model compute in bfloat16, for generation: a step of one token has no legal shape. Changes its configs."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(config := getattr(module, "config", None), TransformerConfig):
                config.fp8 = None
    for layer in emulating_layers(chunks):
        layer.switch_off()
