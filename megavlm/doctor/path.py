"""Which kernels each module of a recipe takes on a machine, and what would be faster."""

from collections.abc import Callable
from dataclasses import dataclass

from megavlm.doctor.machine import Machine
from megavlm.doctor.package import CORES
from megavlm.engines import DeepSpeedEngineConfig, MegatronEngineConfig
from megavlm.engines.fp8 import chip_problem
from megavlm.models.config import VLMConfig

_USE_FUSED = "engine.backend=transformer_engine"


@dataclass(frozen=True)
class Path:
    """What one module runs on."""

    module: str
    path: str
    lost: str = ""
    """What a faster path would save; empty where there is none."""
    mend: str = ""
    """How to get it."""


def find_paths(machine: Machine, engine: MegatronEngineConfig, model: VLMConfig | None) -> list[Path]:
    """Say what each module takes.

    Args:
        machine: this one.
        engine: of the recipe.
        model: of the recipe; None: of any, every module is listed.
    """
    has_experts = model is None or model.language.moe is not None
    crosses = model is None or bool(model.cross_attention_layers)
    paths = [
        _attention(machine, engine),
        _packed_attention(machine),
        *([_cross_attention(machine)] if crosses else []),
        _norm_and_linear(engine, machine),
        _rotary(engine, machine),
        _swiglu(engine, machine),
        Path("softmax", "inside the attention kernels; no scores are held"),
        *([_experts(machine, engine)] if has_experts else []),
        _accumulation(machine, engine),
        _optimizer(machine, engine),
        Path("communication", f"nccl {machine.nccl}" if machine.has_gpu else "gloo"),
    ]
    return paths + _fp8(machine, engine, model)


def can_fuse(machine: Machine) -> bool:
    """Whether Transformer Engine's layers run here."""
    is_in_one_piece = not any(name in machine.versions for name in CORES)
    is_whole = is_in_one_piece or "transformer-engine-torch" in machine.versions
    return machine.has_gpu and "transformer-engine" in machine.versions and is_whole


def _is_fused(engine: MegatronEngineConfig) -> bool:
    return engine.backend == "transformer_engine"


def _half(engine: MegatronEngineConfig) -> bool:
    return engine.precision != "fp32"


def _mend_fused(machine: Machine, engine: MegatronEngineConfig) -> str:
    """How to come to fused layers; nothing where there is no GPU for them."""
    if not machine.has_gpu or _is_fused(engine):
        return ""
    return _USE_FUSED if can_fuse(machine) else f"install Transformer Engine, then {_USE_FUSED}"


def _unless_fused(name: str, fused: str, unfused: str, lost: str) -> Callable[[MegatronEngineConfig, Machine], Path]:
    def path(engine: MegatronEngineConfig, machine: Machine) -> Path:
        if _is_fused(engine):
            return Path(name, fused)
        mend = _mend_fused(machine, engine)
        return Path(name, unfused, lost if mend else "", mend)

    return path


def _attention(machine: Machine, engine: MegatronEngineConfig) -> Path:
    name = "self-attention of decoder and encoder"
    if not machine.has_gpu:
        return Path(name, "CPU: batched products in bfloat16, torch's fused attention else")
    if _is_fused(engine) and _half(engine):
        kernels = "flash-attn or cuDNN" if "flash-attn" in machine.versions else "cuDNN"
        return Path(name, f"Transformer Engine: {kernels}, whichever it takes for the shape")
    if not _half(engine):
        return Path(
            name, "torch's fused attention in float32", "flash kernels take half precision only", "precision=bf16"
        )
    return Path(name, "torch's fused attention (flash kernels inside torch)")


def _packed_attention(machine: Machine) -> Path:
    name = "self-attention of packed rows"
    if machine.can_compile:
        return Path(name, "FlexAttention: blocks between samples are skipped")
    if machine.has_gpu:
        lost = "scores between samples are computed and masked"
        return Path(name, "torch's attention under a full mask", lost, _mend_compile(machine))
    return Path(name, "CPU: under a full mask")


def _cross_attention(machine: Machine) -> Path:
    name = "cross-attention"
    if machine.can_compile:
        return Path(name, "FlexAttention: tiles of other images are skipped")
    if machine.has_gpu:
        return Path(
            name, "FAILS: FlexAttention cannot be compiled", "NVLM-X and NVLM-H do not run", _mend_compile(machine)
        )
    return Path(name, "CPU: under a full mask")


def _mend_compile(machine: Machine) -> str:
    return "pip install triton" if "triton" not in machine.versions else "apt-get install gcc"


_norm_and_linear = _unless_fused(
    "norm and linear",
    "Transformer Engine: LayerNormLinear, one kernel for the norm, its output not kept twice",
    "one after the other: torch's norm, megatron-core's linear",
    "the normalised states are written, read and kept",
)
_rotary = _unless_fused(
    "rotary positions",
    "Transformer Engine's kernel; packed rows unfused",
    "several passes of torch",
    "several passes over queries and keys",
)
_swiglu = _unless_fused(
    "SwiGLU and residual",
    "megatron-core's functions, compiled by torch",
    "several passes of torch",
    "several passes over the widest states",
)


def _experts(machine: Machine, engine: MegatronEngineConfig) -> Path:
    fp8 = engine.active_fp8
    if fp8 is not None and "experts" in fp8.fp8_parts and engine.backend == "fp8_emulation":
        return Path("experts", "one after another, each with FP8 scales of its own")
    if fp8 is not None and "experts" in fp8.fp8_parts:
        return Path("experts", "Transformer Engine's grouped linear layers in FP8, tokens padded for each expert")
    if engine.moe_grouped_gemm:
        return Path("experts", "torch's grouped product, where its shapes allow; else one expert after another")
    return Path(
        "experts", "one after another", "an expert's product is too small to fill a GPU", "engine.moe_grouped_gemm=true"
    )


def _accumulation(machine: Machine, engine: MegatronEngineConfig) -> Path:
    name = "accumulation of gradients"
    if _is_fused(engine) and "fused_weight_gradient_mlp_cuda" in machine.kernels:
        return Path(name, "inside the product (Apex, Transformer Engine)")
    if not _is_fused(engine) or not machine.has_gpu:
        return Path(name, "a kernel after the product")
    return Path(
        name, "a kernel after the product", "each weight's gradient is written twice", "Apex from source: docs/GPU.md"
    )


def _optimizer(machine: Machine, engine: MegatronEngineConfig) -> Path:
    if isinstance(engine, DeepSpeedEngineConfig):
        where = f", on {engine.offload_optimizer}" if engine.offload_optimizer else ""
        return Path("optimizer", f"AdamW of torch, fused over tensors, under ZeRO-{engine.zero_stage}{where}")
    if can_fuse(machine):
        return Path("optimizer", "Transformer Engine's FusedAdam")
    if machine.has_gpu and "amp_C" in machine.kernels:
        return Path("optimizer", "Apex's FusedAdam")
    return Path("optimizer", "AdamW of torch, fused over tensors (megavlm.engines.fused_adam)")


def _fp8(machine: Machine, engine: MegatronEngineConfig, model: VLMConfig | None) -> list[Path]:
    config = engine.active_fp8
    if config is None:
        return []
    parts = ["vision", "connector", "language"]
    parts += ["cross_attention"] if model is None or model.cross_attention_layers else []
    parts += ["experts"] if model is None or model.language.moe is not None else []
    is_emulated = engine.backend == "fp8_emulation"
    problem = None
    if not is_emulated:
        problem = (
            chip_problem(config.recipe, machine.capability, machine.cuda) if machine.has_gpu else "there is no GPU"
        )
    found = []
    for part in parts:
        if part not in config.fp8_parts:
            found.append(Path(f"precision of {part}", "bfloat16"))
        elif problem:
            found.append(Path(f"precision of {part}", f"FAILS: FP8 {config.recipe}", problem, "engine.precision=bf16"))
        else:
            emulated = ", emulated: slower than bfloat16" if is_emulated else ""
            found.append(Path(f"precision of {part}", f"FP8 {config.recipe} ({config.format}){emulated}"))
    return found
