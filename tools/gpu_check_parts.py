"""What ``tools/gpu_check.py`` measures: one function a part, each run in a process of its own.

A part returns rows (name -> figures); a row without figures says why in ``state``.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_check_models import SIZES, SMOKE_SIZES, Size, build, free_memory, make_batches, measure, time_steps
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention.flex_attention import flex_attention

from megavlm.checkpoint import load_checkpoint, save_checkpoint
from megavlm.doctor.machine import look_at_machine
from megavlm.doctor.package import DISTRIBUTIONS
from megavlm.engines.fp8 import recipes_of
from megavlm.models.backend import BACKENDS
from megavlm.models.backend.blocks import attend_in_blocks, can_compile, compiled_flex_attention
from megavlm.models.cross_attention import range_block_mask, range_mask
from megavlm.models.initialization import initialize_weights
from megavlm.runtime import current_device
from megavlm.runtime.process import process, stop

Rows = dict[str, dict[str, Any]]
TORCH = {"backend": "torch", "precision": "bf16"}
FUSED = {"backend": "transformer_engine", "precision": "bf16"}
FUSED_FP8 = {"backend": "transformer_engine", "precision": "fp8"}
_CAUGHT = (ValueError, KeyError, RuntimeError, AssertionError, AttributeError, TypeError, ImportError)
"""What a row may fail with while the others go on: too little memory and kernels that do not compile among them."""
VARIANTS: dict[str, dict[str, Any]] = {"torch bf16": TORCH, "fused bf16": FUSED, "fused fp8": FUSED_FP8}


def report_machine(is_smoke: bool) -> Rows:
    """Versions and the GPU."""
    machine = look_at_machine(DISTRIBUTIONS)
    facts = {**dataclasses.asdict(machine), "kernels": sorted(machine.kernels), "versions": dict(machine.versions)}
    return {"machine": {**facts, "triton compiles": machine.can_compile}}


def compare_backends(is_smoke: bool) -> Rows:
    """The same checkpoint under both backends: losses and gradient norms of three steps."""
    size = (SMOKE_SIZES if is_smoke else SIZES)["small"]
    other = "torch" if is_smoke else "transformer_engine"
    rows: Rows = {}
    for fusion in ("H",) if is_smoke else ("D", "X", "H"):
        for precision, is_packed in (("fp32", False), ("bf16", False), ("bf16", True)):
            settings = {"backend": other, "precision": precision}
            name = f"{fusion} {precision}{', packed rows' if is_packed else ''}"
            rows[name] = _try(settings, _compare_losses, size, fusion, settings, is_packed)
    return rows


def _compare_losses(size: Size, fusion: str, settings: dict[str, Any], is_packed: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        saved = _train_from(size, fusion, {**settings, "backend": "torch"}, Path(folder), is_packed, saves=True)
        loaded = _train_from(size, fusion, settings, Path(folder), is_packed, saves=False)
    relative = [abs(one - other) / max(abs(one), 1e-9) for one, other in zip(saved, loaded, strict=True)]
    return {"largest relative difference": max(relative), "first loss": saved[0], "last loss": saved[-2]}


def _train_from(
    size: Size, fusion: str, settings: dict[str, Any], folder: Path, is_packed: bool, *, saves: bool
) -> list[float]:
    """Losses and gradient norms of some steps from weights that are saved, or that were."""
    with process():
        engine = build(size, fusion, settings, lr=1e-4, trains_vision=True)
        if saves:
            initialize_weights(engine.chunks, seed=5)
            engine.optimizer.reload_model_params()
            save_checkpoint(folder, 1, engine, with_optimizer=False)
        else:
            load_checkpoint(folder, engine, with_optimizer=False)
        batches = make_batches(size, fusion, 2, pad_multiple=16, is_packed=is_packed)
        cost = time_steps(engine, size, fusion, batches, steps=1)
        del engine
        free_memory()
    return [number for pair in zip(cost.losses, cost.grad_norms, strict=True) for number in pair]


def compare_fp8_curves(is_smoke: bool) -> Rows:
    """Losses of BF16 and of each FP8 recipe of the GPU, from the same weights on the same batches."""
    size = (SMOKE_SIZES if is_smoke else SIZES)["small"]
    steps = 3 if is_smoke else 200
    machine = look_at_machine(())
    recipes = recipes_of(machine.capability, machine.cuda) if machine.has_gpu else ["tensorwise"]
    variants = {"bf16": TORCH if is_smoke else FUSED} | {
        f"fp8 {recipe}": {**FUSED_FP8, "fp8": {"recipe": recipe}} for recipe in recipes
    }
    rows = {name: _try(settings, _curve, size, settings, steps) for name, settings in variants.items()}
    plain = rows["bf16"].get("last losses")
    for row in rows.values():
        if plain and "last losses" in row:
            row["against bf16"] = row["last losses"] / plain
    return rows


def _curve(size: Size, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    with process():
        engine = build(size, "D", settings, lr=3e-4)
        batches = make_batches(size, "D", 16, pad_multiple=engine.config.pad_multiple)
        losses = [engine.train_step([batches[step % 16].to(engine.device)]).loss for step in range(steps)]
        del engine
        free_memory()
    tail = losses[-max(1, steps // 10) :]
    return {"last losses": sum(tail) / len(tail), "first loss": losses[0], "curve": losses[:: max(1, steps // 40)]}


def measure_fusion(fusion: str) -> Callable[[bool], Rows]:
    """The part that times a fusion under each backend and precision."""

    def part(is_smoke: bool) -> Rows:
        size = (SMOKE_SIZES if is_smoke else SIZES)["big"]
        steps = 1 if is_smoke else 6
        rows = {name: _try(settings, _measure, size, fusion, settings, steps) for name, settings in VARIANTS.items()}
        first = rows["torch bf16"].get("seconds_per_step")
        fused = rows["fused bf16"].get("seconds_per_step")
        for row in rows.values():
            if "seconds_per_step" in row:
                row["times as fast as torch bf16"] = first / row["seconds_per_step"] if first else None
                row["times as fast as fused bf16"] = fused / row["seconds_per_step"] if fused else None
        return rows

    return part


def compare_attention(is_smoke: bool) -> Rows:
    """FlexAttention and masked attention, forward and backward: cross-attention of NVLM-X, and packed rows."""
    rows_of, length, context, heads, groups, channels = (
        (1, 40, 24, 4, 2, 16) if is_smoke else (2, 2304, 3584, 32, 8, 128)
    )
    device = current_device()
    if device.type == "cuda" and not can_compile():
        return {"FlexAttention": {"state": "not installed: triton"}}
    flex = compiled_flex_attention() if device.type == "cuda" else flex_attention
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def states(tokens: int, num_heads: int) -> torch.Tensor:
        made = torch.randn(tokens, rows_of, num_heads, channels, device=device, dtype=dtype)
        return made.requires_grad_(device.type == "cuda")  # FlexAttention has no backward pass on a CPU

    half = context // 2
    ranges = torch.zeros(rows_of, length, 2, dtype=torch.int64, device=device)
    ranges[:, : length // 2, 1], ranges[:, length // 2 :, 0], ranges[:, length // 2 :, 1] = half, half, context
    query, key, value = states(length, heads), states(context, groups), states(context, groups)
    blocks, mask = range_block_mask(ranges, context), range_mask(ranges, context)

    def with_blocks() -> torch.Tensor:
        parts = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        return flex(*parts, block_mask=blocks, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)

    rows = {"cross-attention": _compare(with_blocks, lambda: _masked(query, key, value, mask), (query, key, value))}
    key, value = states(length, groups), states(length, groups)
    sample = torch.arange(length, device=device) // max(1, length // 4)
    packed = ((sample[:, None] != sample) | torch.ones(length, length, dtype=torch.bool, device=device).triu(1))[
        None, None
    ]
    rows["packed rows"] = _compare(
        lambda: attend_in_blocks(query, key, value, packed, None, flex),
        lambda: _masked(query, key, value, packed),
        (query, key, value),
    )
    return rows


def _masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    attention = BACKENDS["torch"].core_attention(_AttentionConfig(), 1, AttnMaskType.no_mask, "self").eval()
    return attention(query, key, value, mask)  # in evaluation it takes no blocks


@dataclass
class _AttentionConfig:
    context_parallel_size: int = 1
    attention_dropout: float = 0.0


def _compare(
    blocks: Callable[[], torch.Tensor], masked: Callable[[], torch.Tensor], inputs: tuple[Any, ...]
) -> dict[str, Any]:
    outputs, gradients, seconds = [], [], []
    for attend in (blocks, masked):
        times = []
        for _ in range(5):
            start = _now()
            output = attend()
            found = torch.autograd.grad(output.float().square().sum(), inputs) if output.requires_grad else (output,)
            times.append(_now() - start)
        outputs.append(output.detach().float())
        gradients.append(torch.cat([gradient.flatten().float() for gradient in found]))
        seconds.append(min(times[1:]))
    return {
        "milliseconds in blocks": seconds[0] * 1e3,
        "milliseconds masked": seconds[1] * 1e3,
        "times as fast": seconds[1] / seconds[0],
        "largest difference": (outputs[0] - outputs[1]).abs().max().item(),
        "difference of gradients": (F.mse_loss(*gradients).sqrt() / gradients[1].std()).item(),
    }


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare_experts(is_smoke: bool) -> Rows:
    """Experts of a step: one after another, grouped by torch, grouped in FP8."""
    size = (SMOKE_SIZES if is_smoke else SIZES)["experts"]
    variants = {
        "one after another, torch": {**TORCH, "moe_grouped_gemm": False},
        "grouped, torch": TORCH,
        "one after another, fused": {**FUSED, "moe_grouped_gemm": False},
        "grouped, fused": FUSED,
        "grouped, FP8 but experts": {**FUSED_FP8, "fp8": {"experts": "bf16"}},
        "grouped, FP8": FUSED_FP8,
    }
    steps = 1 if is_smoke else 5
    return {name: _try(settings, _measure, size, "D", settings, steps) for name, settings in variants.items()}


def compare_recomputation(is_smoke: bool) -> Rows:
    """Memory and time of a step with and without recomputation."""
    size = (SMOKE_SIZES if is_smoke else SIZES)["middle"]
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    selective = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    rows: Rows = {}
    for backend, settings in (("torch", TORCH), ("fused", FUSED), ("fused fp8", FUSED_FP8)):
        for name, recompute in (("nothing", {}), ("attention", selective), ("layers", full)):
            merged = {**settings, **recompute}
            steps = 1 if is_smoke else 3
            rows[f"{backend}, {name}"] = _try(merged, _measure, size, "D", merged, steps)
    return rows


def _measure(size: Size, fusion: str, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    return dataclasses.asdict(measure(size, fusion, settings, steps=steps))


def _try(settings: dict[str, Any], run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run a row; where it cannot run, say why and let the others go on."""
    if settings["backend"] not in BACKENDS:
        return {"state": "not installed: Transformer Engine"}
    try:
        return {"state": "measured", **run(*arguments)}
    except _CAUGHT as error:
        state = f"failed: {type(error).__name__}: {error}"[:1000]
    stop()  # of NCCL, a failed run leaves its groups to the end of the process
    free_memory()  # which the error's frames held until here
    return {"state": state}


@dataclass(frozen=True)
class Part:
    """One of the things that only a GPU can show."""

    run: Callable[[bool], Rows]
    limit_seconds: float
    """After which it is stopped."""


PARTS: dict[str, Part] = {
    "machine": Part(report_machine, 60),
    "backends": Part(compare_backends, 110),
    "speed_D": Part(measure_fusion("D"), 90),
    "attention": Part(compare_attention, 60),
    "fp8_curves": Part(compare_fp8_curves, 110),
    "speed_X": Part(measure_fusion("X"), 110),
    "speed_H": Part(measure_fusion("H"), 110),
    "experts": Part(compare_experts, 80),
    "recomputation": Part(compare_recomputation, 90),
}
"""In the order of their worth: what does not fit into the time is left out from the end."""
