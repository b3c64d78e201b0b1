"""Times a recipe's real training steps: its data, its engine, its optimizer. Nothing is loaded and nothing is saved."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from rich.console import Console
from rich.table import Table

from megavlm.benchmark.breakdown import LABELS
from megavlm.benchmark.detail import Detail, measure_detail
from megavlm.benchmark.experts import DISPATCH, PHASES, time_experts
from megavlm.benchmark.memory import read_memory
from megavlm.benchmark.trial import NUMBERS_OF_WORK, TimedStep, Trial, Work
from megavlm.engines import MegatronEngine
from megavlm.recipe import Recipe
from megavlm.runtime.process import Process


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
    detail: Detail | None = None
    """What a step goes to, if it was asked for."""

    @property
    def dispatch_share(self) -> float:
        """Share of a step that tokens need to come to their experts and back."""
        return sum(self.expert_shares.get(phase, 0.0) for phase in DISPATCH)

    @property
    def seconds_per_step(self) -> float:
        """Median of the timed steps."""
        return statistics.median(self.step_seconds)


def measure_speed(
    recipe: Recipe, process: Process, *, num_steps: int, num_warmup_steps: int, is_detailed: bool = False
) -> Speed:
    """Build the model with fresh weights and train it for some steps. All ranks call it; all get the same result.

    ``checkpoint.pretrained_checkpoint`` is not read, because values of weights cost nothing; ``checkpoint.save`` is not
    touched. The default process group must exist.

    Args:
        recipe: what to run.
        process: this rank.
        num_steps: steps that are timed; at least 1.
        num_warmup_steps: steps before them that are not.
        is_detailed: also find out what a step goes to, in as many steps again.

    Raises:
        ValueError: something in the recipe or its data does not fit.
    """
    trial = Trial(recipe, process)
    engine = trial.engine
    steps = [trial.step() for _ in range(num_warmup_steps + num_steps)]
    steps = _agree(engine, steps[num_warmup_steps:])
    peaks = [read_memory(process.device).peak, trial.memory_before_model_bytes]
    memory = torch.tensor(peaks, dtype=torch.int64, device=engine.device)
    torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MAX)
    shares = _expert_shares(trial, num_steps)
    return _summarize(
        expert_shares=shares,
        steps=steps,
        memory=memory.tolist(),
        warmup_steps=num_warmup_steps,
        num_ranks=process.world_size,
        recipe=recipe,
        detail=measure_detail(trial, steps) if is_detailed else None,
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
    if speed.detail is not None:
        _add_detail(table, speed.detail)
    Console().print(table)


def write_speed(speed: Speed, path: Path) -> None:
    """Write it as JSON that :func:`read_speed` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".writing")
    unfinished.write_text(json.dumps(asdict(speed), indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def speed_from_json(tree: dict[str, Any]) -> Speed:
    """Make it of what ``dataclasses.asdict`` gave.

    Raises:
        AttributeError, KeyError, TypeError: it is something else.
    """
    detail = tree.get("detail")
    return Speed(**{**tree, "detail": None if detail is None else Detail.from_json(detail)})


def read_speed(path: Path) -> Speed:
    """Read what :func:`write_speed` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        return speed_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is not a measurement of this version of MegaVLM ({error}). Delete it.") from None


def _add_detail(table: Table, detail: Detail) -> None:
    table.add_row("MFU, padding left out", f"{detail.mfu:.1%} (with padding: {detail.mfu_with_padding:.1%})")
    table.add_row("  of a peak of", f"{detail.peak_flops_per_second:.3e} FLOP/s, {detail.peak_source}")
    table.add_row("padding", f"{detail.padded_share:.1%} of the decoder's positions")
    for part, flops in detail.flops.items():
        useful = detail.useful_flops.get(part, 0.0)
        table.add_row(f"FLOPs of a step: {part}", f"{flops:.3e} (padding left out: {useful:.3e})")
    table.add_row("a step in parts", f"{detail.labelled_step_seconds:.3f} s, mean of the ranks")
    for label in LABELS:
        seconds = detail.breakdown_seconds[label]
        table.add_row(
            f"  {label}", f"{detail.share(label):6.1%}  {seconds:.4f} s (most: {detail.most_seconds[label]:.4f})"
        )
    for speed in detail.collectives:
        rate = f"{speed.bus_bytes_per_second / 1e9:.2f} GB/s sent by each rank"
        table.add_row(f"{speed.name}, {speed.group} {speed.group_size}", rate)


def _agree(engine: MegatronEngine, steps: Sequence[TimedStep]) -> list[TimedStep]:
    """What rank 0 timed and all replicas counted, on every rank."""
    summed = engine.sum_over_replicas([number for step in steps for number in step.work.numbers()])
    times = [second for step in steps for second in (step.seconds, step.data_wait_seconds)]
    numbers = torch.tensor([*times, *summed], dtype=torch.float64, device=engine.device)
    torch.distributed.broadcast(numbers, src=0)
    seconds = numbers[: 2 * len(steps)].view(-1, 2).tolist()
    works = numbers[2 * len(steps) :].view(len(steps), NUMBERS_OF_WORK).tolist()
    return [
        TimedStep(step_seconds, wait_seconds, Work.from_numbers(work))
        for (step_seconds, wait_seconds), work in zip(seconds, works, strict=True)
    ]


def _expert_shares(trial: Trial, num_steps: int) -> dict[str, float]:
    """Train some more steps and time the phases of the layers with experts."""
    if trial.parts.recipe.model.language.moe is None:
        return {}
    took = 0.0
    with time_experts(trial.engine.chunks, trial.wait) as seconds:
        for _ in range(num_steps):
            took += trial.step().seconds
    shares = [seconds[phase] / took for phase in PHASES]
    numbers = torch.tensor(shares, dtype=torch.float64, device=trial.engine.device)
    torch.distributed.broadcast(numbers, src=0)
    return dict(zip(PHASES, numbers.tolist(), strict=True))


def _summarize(
    *,
    expert_shares: dict[str, float],
    steps: Sequence[TimedStep],
    memory: list[int],
    warmup_steps: int,
    num_ranks: int,
    recipe: Recipe,
    detail: Detail | None = None,
) -> Speed:
    def rate(name: str) -> float:
        """Median over the steps of a count by the second: a step's length goes with what is in it."""
        return statistics.median(getattr(step.work, name) / step.seconds for step in steps)

    return Speed(
        step_seconds=[step.seconds for step in steps],
        data_wait_seconds=statistics.median(step.data_wait_seconds for step in steps),
        samples_per_second=rate("samples"),
        tokens_per_second=rate("tokens"),
        tiles_per_second=rate("tiles"),
        flops_per_sample=sum(step.work.flops for step in steps) / max(1, sum(step.work.samples for step in steps)),
        flops_per_second=rate("flops"),
        peak_memory_bytes=memory[0],
        memory_before_model_bytes=memory[1],
        warmup_steps=warmup_steps,
        num_ranks=num_ranks,
        recipe=recipe.model_dump(mode="json"),
        expert_shares=expert_shares,
        detail=detail,
    )
