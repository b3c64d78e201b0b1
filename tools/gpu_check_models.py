"""The models of ``tools/gpu_check.py``, made-up batches for them, and what a step of them costs."""

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megavlm.batch import Batch, TileRoute
from megavlm.data import Sample, collate
from megavlm.data.collate import pack
from megavlm.data.encoding import ImageSlot, TokenRun
from megavlm.data.expansion import ImageTokens, count_tokens, expand, route_tile
from megavlm.engines import MegatronEngine, MegatronEngineConfig, OptimizerSettings
from megavlm.models.config import VLMConfig
from megavlm.models.vlm import VLM
from megavlm.planning.flops import count_flops
from megavlm.runtime.process import process
from megavlm.training.freeze import freeze_except

FUSIONS: dict[str, dict[str, Any]] = {
    "D": {"kind": "decoder_only"},
    "X": {"kind": "cross_attention", "every_n_layers": 6, "gate_init": 1.0},
    "H": {"kind": "hybrid", "every_n_layers": 6, "gate_init": 1.0},
}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "GB200": 2500e12, "A100": 312e12}
"""Name of a GPU holds the key -> FLOP/s of dense bfloat16 products, by NVIDIA's data sheets."""


@dataclass(frozen=True)
class Size:
    """A model and a row of it."""

    image_size: int
    vision: dict[str, Any]
    language: dict[str, Any]
    vocab_size: int
    num_tiles: int
    """Of the one image of a row, the thumbnail counted."""
    text_length: int
    """Tokens of text in a row."""
    num_rows: int
    """Of a micro-batch."""
    moe: dict[str, Any] | None = None

    def model(self, fusion: str) -> VLMConfig:
        """The model's config."""
        internvit = {
            "kind": "internvit",
            "image_size": self.image_size,
            "normalization": "LayerNorm",
            "qk_layernorm": False,
            "add_qkv_bias": True,
            **self.vision,
        }
        connector = {"kind": "mlp", "num_layers": 1 if fusion == "X" else 2}
        language = {**self.language, **({"moe": self.moe} if self.moe else {})}
        tree = {"vision": internvit, "connector": connector, "fusion": FUSIONS[fusion], "language": language}
        return VLMConfig.model_validate(tree)


def _language(layers: int, width: int, inner: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": width,
        "ffn_hidden_size": inner,
        "num_attention_heads": heads,
        "num_query_groups": groups,
    }


def _vision(patch: int, layers: int, width: int, inner: int, heads: int) -> dict[str, Any]:
    return {
        "patch_size": patch,
        "num_layers": layers,
        "hidden_size": width,
        "ffn_hidden_size": inner,
        "num_attention_heads": heads,
    }


INTERNVIT_300M = _vision(14, 24, 1024, 4096, 16)
SMALL_VISION = _vision(14, 4, 256, 1024, 4)
TINY_VISION = _vision(14, 1, 32, 64, 2)
TINY = Size(56, TINY_VISION, _language(2, 64, 128, 4, 2), 128, 3, 32, 2)
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 2}
# "big" has the layers of an 8B model, half of them: all of it with gradients and moments in float32 is 144 GB
SIZES: dict[str, Size] = {
    "big": Size(448, INTERNVIT_300M, _language(16, 4096, 14336, 32, 8), 32000, 7, 2304, 2),
    "middle": Size(448, INTERNVIT_300M, _language(16, 2048, 5632, 16, 4), 32000, 7, 2304, 2),
    "small": Size(112, SMALL_VISION, _language(8, 768, 2048, 12, 4), 8192, 3, 464, 8),
    "experts": Size(112, SMALL_VISION, _language(8, 1024, 2816, 16, 4), 8192, 3, 2000, 4, EXPERTS),
}
SMOKE_SIZES = {**dict.fromkeys(SIZES, TINY), "experts": Size(**{**TINY.__dict__, "moe": {"num_moe_experts": 2}})}


@dataclass
class Cost:
    """What the timed steps of a model cost."""

    seconds_per_step: float
    samples_per_second: float
    tokens_per_second: float
    flops_per_second: float
    mfu: float | None
    """Share of the GPU's bfloat16 rate; None where that is not known."""
    peak_memory_gib: float
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)


def make_batches(
    size: Size, fusion: str, num_batches: int, *, pad_multiple: int, seed: int = 1, is_packed: bool = False
) -> list[Batch]:
    """Make micro-batches as a loader does: a row of text with one image, or two such samples packed into a row."""
    generator = torch.Generator().manual_seed(seed)
    config = size.model(fusion)
    options = {"pad_id": 0, "tile_size": size.image_size, "pad_multiple": pad_multiple}
    batches = []
    for _ in range(num_batches):
        rows = [[_sample(size, config, generator) for _ in range(1 + is_packed)] for _ in range(size.num_rows)]
        uses_context = config.fusion.tile_route.uses_context
        if is_packed:
            batches.append(pack(rows, uses_context=uses_context, **options))
        else:
            batches.append(collate([row[0] for row in rows], uses_context=uses_context, **options))
    return batches


def _sample(size: Size, config: VLMConfig, generator: torch.Generator) -> Sample:
    route: TileRoute = config.fusion.tile_route
    first = int(torch.randint(0, size.vocab_size - 1, (1,), generator=generator))
    # each token follows from the one before, so that there is something to learn
    ids = [(first * pow(5, place, size.vocab_size - 1) + place) % (size.vocab_size - 1) for place in range(16)]
    text = [ids[(place * (1 + first % 3)) % 16] for place in range(size.text_length - 2 * size.num_tiles)]
    tiles = tuple(
        route_tile((1, 2), config.tokens_per_tile, route, is_whole_image=number == size.num_tiles - 1)
        for number in range(size.num_tiles)
    )
    runs = [TokenRun(tuple(text[:4]), is_trained=False), ImageSlot(), TokenRun(tuple(text[4:]), is_trained=True)]
    images = [ImageTokens(tiles)]
    expansion = expand(runs, images, size.vocab_size - 1, route.text_sees)
    assert count_tokens(runs, images) == expansion.tokens.numel()
    shape = (size.num_tiles, 3, size.image_size, size.image_size)
    tiles = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return expansion.with_tiles("made up", tiles, [size.num_tiles])


def build(
    size: Size, fusion: str, settings: dict[str, Any], *, lr: float, trains_vision: bool = False
) -> MegatronEngine:
    """Start an engine with a model, its fresh weights drawn on the device: the same for every backend and precision.

    Raises:
        ValueError: the backend is not installed, or the GPU cannot do the precision.
    """
    engine = MegatronEngine(MegatronEngineConfig(**settings))
    engine.start()
    config = engine.config
    model = VLM(
        size.model(fusion),
        config.megatron_settings(),
        vocab_size=size.vocab_size,
        image_token_id=size.vocab_size - 1,
        backend=config.backend,
        bf16_parts=config.bf16_parts,
    ).to(engine.device)
    draw_weights(model)
    parts = ["connector", "cross_attention", "language", *(["vision"] if trains_vision else [])]
    freeze_except([model], parts)
    engine.wrap([model])
    engine.build_optimizer(OptimizerSettings(lr=lr, clip_grad=1.0))
    return engine


def draw_weights(model: torch.nn.Module) -> None:
    """Fill a model for timing: what is drawn depends on the layers' order, which differs between backends."""
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            constant = getattr(parameter, "constant", None)
            if constant is not None:
                parameter.fill_(constant)
            elif parameter.dim() < 2:
                parameter.zero_()
            else:
                parameter.normal_(std=0.02, generator=generator)


def time_steps(engine: MegatronEngine, size: Size, fusion: str, batches: Sequence[Batch], steps: int) -> Cost:
    """Train some steps on the same batches, the first two untimed."""
    flops = sum(
        count_flops(
            size.model(fusion),
            batch,
            vocab_size=size.vocab_size,
            trainable=("connector", "cross_attention", "language"),
        ).total
        for batch in batches
    )
    tokens = sum(batch.tokens.numel() for batch in batches)
    samples = sum(batch.cu_seqlens.numel() - 1 for batch in batches)
    there = [batch.to(engine.device) for batch in batches]
    seconds, losses, norms = [], [], []
    for step in range(steps + 2):
        if step == 2 and engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = engine.train_step(there)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    median = statistics.median(seconds[2:])
    peak = peak_flops()
    memory = torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else 0
    return Cost(
        seconds_per_step=median,
        samples_per_second=samples / median,
        tokens_per_second=tokens / median,
        flops_per_second=flops / median,
        mfu=flops / median / peak if peak else None,
        peak_memory_gib=memory / 2**30,
        losses=losses,
        grad_norms=norms,
    )


def measure(
    size: Size, fusion: str, settings: dict[str, Any], *, steps: int, num_batches: int = 2, is_packed: bool = False
) -> Cost:
    """Build a model in a run of its own, time its steps, and leave the device empty."""
    with process():
        engine = build(size, fusion, settings, lr=1e-5)
        batches = make_batches(size, fusion, num_batches, pad_multiple=engine.config.pad_multiple, is_packed=is_packed)
        cost = time_steps(engine, size, fusion, batches, steps)
        del engine
        free_memory()
    return cost


def free_memory() -> None:
    """Give back what the last model held: its hooks keep it in a cycle."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_flops() -> float | None:
    """The GPU's rate; None where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((rate for key, rate in PEAK_FLOPS.items() if key in name), None)
