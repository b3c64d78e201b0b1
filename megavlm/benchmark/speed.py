"""Times a recipe's real training steps: its data, its engine, its optimizer. Nothing is loaded and nothing is saved."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megavlm.batch import Batch
from megavlm.benchmark.experts import DISPATCH, PHASES, time_experts
from megavlm.build import Parts, build_parts
from megavlm.engines.feed import Feed, is_reader
from megavlm.models.initialization import initialize_weights
from megavlm.planning.flops import count_flops
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER
from megavlm.runtime.process import Process
from megavlm.training.feeding import build_training_loader, training_steps
from megavlm.training.freeze import freeze_except
from megavlm.training.schedule import build_schedule

_STATUS_FILE = Path("/proc/self/status")


@dataclass(frozen=True)
class Speed:
    """What the training steps of a recipe cost. Rates are medians over the timed steps, of all ranks together."""

    step_seconds: list[float]
    """Of each timed step, the wait for its data included."""
    data_wait_seconds: float
    """Median wait of a step for its data."""
    samples_per_second: float
    """Samples that gave a row; skipped ones do not count."""
    tokens_per_second: float
    """Positions of the decoder, text and image, that are not padding. Tiles that a model reads by cross-attention only
    take none, so that models of different fusions compare by samples."""
    tiles_per_second: float
    flops_per_sample: float
    """Forward and backward pass (:func:`megavlm.planning.flops.count_flops`), padding of the batches included."""
    flops_per_second: float
    peak_memory_bytes: int
    """Most of a rank: what torch allocated on a CUDA device, or the whole process's memory on a CPU."""
    memory_before_model_bytes: int
    """The part of it that was there before the model was built: Python, libraries, the index of the data."""
    warmup_steps: int
    num_ranks: int
    recipe: dict[str, Any]
    """The resolved recipe."""
    expert_shares: dict[str, float] = field(default_factory=dict)
    """Phase of layers with experts (:data:`megavlm.benchmark.experts.PHASES`) -> share of a step of rank 0, measured in
    as many steps after the timed ones; empty where there are no experts."""

    @property
    def dispatch_share(self) -> float:
        """Share of a step that tokens need to come to their experts and back."""
        return sum(self.expert_shares.get(phase, 0.0) for phase in DISPATCH)

    @property
    def seconds_per_step(self) -> float:
        """Median of the timed steps."""
        return statistics.median(self.step_seconds)


@dataclass(frozen=True)
class Work:
    """What is in the micro-batches of a step."""

    samples: int
    tokens: int
    tiles: int
    flops: int


def measure_speed(recipe: Recipe, process: Process, *, num_steps: int, num_warmup_steps: int) -> Speed:
    """Build the model with fresh weights and train it for some steps. All ranks call it; all get the same result.

    ``checkpoint.pretrained_checkpoint`` is not read, because values of weights cost nothing; ``checkpoint.save`` is not
    touched. The default process group must exist.

    Args:
        recipe: what to run.
        process: this rank.
        num_steps: steps that are timed; at least 1.
        num_warmup_steps: steps before them that are not.

    Raises:
        ValueError: something in the recipe or its data does not fit.
    """
    parts = build_parts(recipe, world_size=process.world_size)
    engine = parts.engine
    loader = build_training_loader(parts, recipe.data.train.build()) if is_reader() else None
    memory_before = _memory(process.device).now
    _build_model(parts)
    feed = Feed(training_steps(parts, loader) if loader is not None else None)
    schedule = build_schedule(
        engine.optimizer, recipe.training.optimizer, train_iters=recipe.training.train_iters, iteration=0
    )
    seconds, waits, works = [], [], []
    for _ in range(num_warmup_steps + num_steps):
        start = time.perf_counter()
        batches = next(feed)
        waits.append(time.perf_counter() - start)
        schedule.step(increment=1)
        result = engine.train_step(batches)
        _wait_for_device(process.device)
        seconds.append(time.perf_counter() - start)
        works.append(_count_work(parts, batches))
        if result.skip_reason is not None:
            LOGGER.warning("step %d did not update the weights: %s", len(works), result.skip_reason)
    timed = slice(num_warmup_steps, None)
    summed = engine.sum_over_replicas([number for work in works[timed] for number in astuple(work)])
    # what rank 0 timed and its replicas counted, on every rank
    numbers = torch.tensor([*seconds[timed], *waits[timed], *summed], dtype=torch.float64, device=engine.device)
    torch.distributed.broadcast(numbers, src=0)
    per_step = numbers.view(-1, num_steps)[:2].tolist()
    memory = torch.tensor([_memory(process.device).peak, memory_before], dtype=torch.int64, device=engine.device)
    torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MAX)
    shares = _expert_shares(parts, feed, num_steps)
    return _summarize(
        expert_shares=shares,
        step_seconds=per_step[0],
        waits=per_step[1],
        works=[Work(*map(int, row)) for row in numbers[2 * num_steps :].view(num_steps, -1).tolist()],
        memory=memory.tolist(),
        warmup_steps=num_warmup_steps,
        num_ranks=process.world_size,
        recipe=recipe,
    )


def print_speed(speed: Speed) -> None:
    """Print what was measured."""
    seconds, recipe = speed.step_seconds, speed.recipe
    table = Table("", "", title=f"{len(seconds)} steps on {speed.num_ranks} rank(s)", show_header=False)
    table.add_row(
        "seconds per step", f"{speed.seconds_per_step:.3f} (median; {min(seconds):.3f} to {max(seconds):.3f})"
    )
    table.add_row("  of it waiting for data", f"{speed.data_wait_seconds:.3f}")
    table.add_row("samples/s", f"{speed.samples_per_second:.2f} ({recipe['training']['global_batch_size']} a step)")
    table.add_row("tokens/s", f"{speed.tokens_per_second:,.0f}")
    table.add_row("tiles/s", f"{speed.tiles_per_second:,.1f}")
    table.add_row("FLOPs per sample", f"{speed.flops_per_sample:.3e}")
    table.add_row("model FLOP/s", f"{speed.flops_per_second:.3e}")
    before = f"{speed.memory_before_model_bytes / 2**20:,.0f} MiB before the model"
    table.add_row("peak memory of a rank", f"{speed.peak_memory_bytes / 2**20:,.0f} MiB ({before})")
    for phase, share in speed.expert_shares.items():
        table.add_row(f"experts: {phase}", f"{share:.1%} of a step")
    Console().print(table)


def write_speed(speed: Speed, path: Path) -> None:
    """Write it as JSON that :func:`read_speed` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".writing")
    unfinished.write_text(json.dumps(asdict(speed), indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read_speed(path: Path) -> Speed:
    """Read what :func:`write_speed` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        return Speed(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: is not a measurement of this version of MegaVLM ({error}). Delete it.") from None


def count_positions(tokens: Tensor, pad_id: int) -> Tensor:
    """Positions of each row before its padding.

    Padding is what stands at a row's end and equals ``pad_id``; a tokenizer whose padding is its end-of-text token
    loses the one that ends a row.

    Args:
        tokens: ``[N, S]`` int64.
        pad_id: of the tokenizer.

    Returns:
        ``[N]`` int64.
    """
    numbers = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).expand_as(tokens)
    return numbers.masked_fill(tokens == pad_id, 0).amax(dim=1)


def _build_model(parts: Parts) -> None:
    recipe, engine = parts.recipe, parts.engine
    chunks = parts.build_chunks()
    initialize_weights(chunks, recipe.training.seed)
    freeze_except(chunks, recipe.training.trainable)
    engine.wrap(chunks)
    engine.build_optimizer(recipe.training.optimizer)


def _count_work(parts: Parts, batches: Sequence[Batch]) -> Work:
    """What a replica's micro-batches hold. Only its reader has the tiles; other ranks count nothing."""
    if not is_reader():
        return Work(0, 0, 0, 0)
    samples = tokens = tiles = flops = 0
    for batch in batches:
        positions = count_positions(batch.tokens, parts.tokenizer.pad_id)
        samples += batch.cu_seqlens.numel() - 1 - int((positions == 0).sum())
        tokens += int(positions.sum())
        tiles += batch.tiles.shape[0]
        flops += count_flops(
            parts.recipe.model,
            batch,
            vocab_size=parts.tokenizer.vocab_size,
            trainable=parts.recipe.training.trainable,
        ).total
    return Work(samples, tokens, tiles, flops)


def _expert_shares(parts: Parts, feed: Feed, num_steps: int) -> dict[str, float]:
    """Train some more steps and time the phases of the layers with experts."""
    engine = parts.engine
    if parts.recipe.model.language.moe is None:
        return {}
    start = time.perf_counter()
    with time_experts(engine.chunks, lambda: _wait_for_device(engine.device)) as seconds:
        for _ in range(num_steps):
            engine.train_step(next(feed))
            _wait_for_device(engine.device)
    took = time.perf_counter() - start
    shares = torch.tensor([seconds[phase] / took for phase in PHASES], dtype=torch.float64, device=engine.device)
    torch.distributed.broadcast(shares, src=0)
    return dict(zip(PHASES, shares.tolist(), strict=True))


def _summarize(
    *,
    expert_shares: dict[str, float],
    step_seconds: list[float],
    waits: list[float],
    works: list[Work],
    memory: list[int],
    warmup_steps: int,
    num_ranks: int,
    recipe: Recipe,
) -> Speed:
    def rate(name: str) -> float:
        """Median over the steps of a count by the second: a step's length goes with what is in it."""
        return statistics.median(
            getattr(work, name) / seconds for work, seconds in zip(works, step_seconds, strict=True)
        )

    return Speed(
        step_seconds=step_seconds,
        data_wait_seconds=statistics.median(waits),
        samples_per_second=rate("samples"),
        tokens_per_second=rate("tokens"),
        tiles_per_second=rate("tiles"),
        flops_per_sample=sum(work.flops for work in works) / max(1, sum(work.samples for work in works)),
        flops_per_second=rate("flops"),
        peak_memory_bytes=memory[0],
        memory_before_model_bytes=memory[1],
        warmup_steps=warmup_steps,
        num_ranks=num_ranks,
        recipe=recipe.model_dump(mode="json"),
        expert_shares=expert_shares,
    )


@dataclass(frozen=True)
class _Memory:
    peak: int
    now: int


def _memory(device: torch.device) -> _Memory:
    """Bytes of this process: allocated by torch on CUDA, else resident."""
    if device.type == "cuda":
        return _Memory(torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device))
    if _STATUS_FILE.exists():
        # not getrusage: on Linux its peak begins with that of the process that started this one
        fields = dict(line.split(":", 1) for line in _STATUS_FILE.read_text(encoding="ascii").splitlines())
        peak, now = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))
        return _Memory(peak, now)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _Memory(peak, peak)  # so far


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
