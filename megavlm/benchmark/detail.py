"""What a step's time, operations and memory go to, and how fast the ranks talk: the figures behind a step's length."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state

from megavlm.benchmark.breakdown import COMMUNICATION, DATA_WAIT, LABELS, PIPELINE, label_steps
from megavlm.benchmark.memory import read_memory
from megavlm.benchmark.peak import find_peak
from megavlm.benchmark.timeline import Timeline
from megavlm.benchmark.trial import TimedStep, Trial, Work
from megavlm.benchmark.useful import COUNTED
from megavlm.preflight.bandwidth import BANDWIDTH_BYTES, sent_share, time_collective


@dataclass(frozen=True)
class CollectiveSpeed:
    """A collective, timed alone, over the ranks that use it in this layout."""

    group: str
    """``tp``, ``dp``, ``pp``, ``ep``, or ``all`` ranks."""
    group_size: int
    name: str
    num_bytes: int
    """Of the whole tensor."""
    seconds: float
    """Of one, on the slowest rank of rank 0's group."""
    bus_bytes_per_second: float
    """What each rank has to send for it at least, by the second."""


@dataclass(frozen=True)
class Detail:
    """Figures behind the length of a step. Means over steps; all ranks have the same."""

    breakdown_seconds: dict[str, float]
    """Label (:data:`megavlm.benchmark.breakdown.LABELS`) -> seconds of a step, mean of the ranks. Add up to
    ``labelled_step_seconds``."""
    most_seconds: dict[str, float]
    """Label -> seconds on the rank that has most of it."""
    labelled_step_seconds: float
    """Of the steps that were divided, which come after the timed ones. Longer than those by what labels cost."""
    flops: dict[str, float]
    """Part -> operations of a step, padding included; ``experts`` and ``router`` are inside ``language``."""
    useful_flops: dict[str, float]
    """The part of them that is not spent on padding."""
    tokens_per_step: float
    """Positions of the decoder that are not padding."""
    padded_tokens_per_step: float
    """Positions of the decoder that are."""
    peak_flops_per_second: float
    """Of one device, mean of the ranks."""
    peak_source: str
    """Where that number is from: a data sheet, or measured."""
    mfu: float
    """Useful operations by the seconds of all devices, over the peak: median of the timed steps. Nothing recomputed
    counts."""
    mfu_with_padding: float
    """The same with the operations on padding."""
    peak_memory_bytes: list[int]
    """Of each rank."""
    collectives: list[CollectiveSpeed]

    def share(self, *labels: str) -> float:
        """Labels' share of a step."""
        return sum(self.breakdown_seconds[label] for label in labels) / self.labelled_step_seconds

    @property
    def communication_share(self) -> float:
        """Of a step: exposed collectives, and sending and receiving between stages with the bubble."""
        return self.share(COMMUNICATION, PIPELINE)

    @property
    def data_wait_share(self) -> float:
        """Of a step."""
        return self.share(DATA_WAIT)

    @property
    def padded_share(self) -> float:
        """Of the decoder's positions."""
        return self.padded_tokens_per_step / max(1.0, self.padded_tokens_per_step + self.tokens_per_step)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Detail":
        """Read what ``dataclasses.asdict`` made."""
        return cls(**{**tree, "collectives": [CollectiveSpeed(**one) for one in tree["collectives"]]})


def measure_detail(trial: Trial, timed: Sequence[TimedStep]) -> Detail:
    """Divide as many further steps as were timed, and measure what surrounds them. All ranks call it together.

    Args:
        trial: after its timed steps.
        timed: those, with rank 0's seconds and the work of all ranks on each rank.
    """
    memory = _of_ranks([read_memory(trial.engine.device).peak], trial.engine.device)  # before anything of ours
    peaks = find_peak(trial.engine.device, trial.parts.recipe.engine.precision)
    peak = float(_of_ranks([peaks.flops_per_second], trial.engine.device).mean())
    seconds = _divide_steps(trial, len(timed))
    works: list[Work] = [step.work for step in timed]
    at_most = peak * torch.distributed.get_world_size()
    num_steps = len(timed)
    tokens, positions = (sum(getattr(work, name) for work in works) for name in ("tokens", "positions"))
    return Detail(
        breakdown_seconds=dict(zip(LABELS, seconds.mean(dim=0).tolist(), strict=True)),
        most_seconds=dict(zip(LABELS, seconds.amax(dim=0).tolist(), strict=True)),
        labelled_step_seconds=float(seconds.sum(dim=1).mean()),
        flops=_mean_by_part([work.flops_of for work in works]),
        useful_flops=_mean_by_part([work.useful_flops_of for work in works]),
        tokens_per_step=tokens / num_steps,
        padded_tokens_per_step=(positions - tokens) / num_steps,
        peak_flops_per_second=peak,
        peak_source=peaks.source,
        mfu=statistics.median(step.work.useful_flops / step.seconds for step in timed) / at_most,
        mfu_with_padding=statistics.median(step.work.flops / step.seconds for step in timed) / at_most,
        peak_memory_bytes=[int(row) for row in memory[:, 0].tolist()],
        collectives=_time_collectives(trial.engine.device),
    )


def _divide_steps(trial: Trial, num_steps: int) -> torch.Tensor:
    """Seconds of a step by label, ``[ranks, labels]`` float64: means of some steps."""
    timeline = Timeline(trial.engine.device)
    total: Counter[str] = Counter()
    with label_steps(trial.engine, timeline):
        for _ in range(num_steps):
            total.update(trial.step(timeline).label_seconds)
    return _of_ranks([total[label] / num_steps for label in LABELS], trial.engine.device)


def _of_ranks(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """The numbers of every rank, on every rank: ``[ranks, numbers]`` float64 on the CPU."""
    world_size = torch.distributed.get_world_size()
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    everyones = [torch.empty_like(mine) for _ in range(world_size)]
    torch.distributed.all_gather(everyones, mine)
    return torch.stack(everyones).cpu()


def _mean_by_part(counts: Sequence[tuple[int, ...]]) -> dict[str, float]:
    sums = (sum(column) for column in zip(*counts, strict=True))
    return {part: total / len(counts) for part, total in zip(COUNTED, sums, strict=True) if total}


def _time_collectives(device: torch.device) -> list[CollectiveSpeed]:
    """Those that a training step of this layout uses, each in its groups."""
    groups = {
        "tp": (parallel_state.get_tensor_model_parallel_group(), ("all_reduce", "all_gather", "reduce_scatter")),
        "dp": (parallel_state.get_data_parallel_group(), ("all_reduce", "all_gather", "reduce_scatter")),
        "pp": (parallel_state.get_pipeline_model_parallel_group(), ("send_to_next",)),
        "ep": (parallel_state.get_expert_model_parallel_group(), ("all_to_all",)),
        "all": (torch.distributed.group.WORLD, ("all_reduce",)),
    }
    num_bytes = BANDWIDTH_BYTES[device.type]
    found = []
    for label, (group, names) in groups.items():
        size = group.size()
        for name in names if size > 1 else ():
            seconds = time_collective(name, group, device, num_bytes)
            rate = num_bytes / seconds * sent_share(name, size)
            found.append(CollectiveSpeed(label, size, name, num_bytes, seconds, rate))
    return found
