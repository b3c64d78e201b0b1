"""The order of the micro-batches of a step, so that the stages of a pipeline wait little for each other.

Where images are many or few, the first stage, which holds the vision encoder, works unevenly. The loss is a sum over
the micro-batches, so their order is free.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pydantic

from megavlm.batch import Batch
from megavlm.config import Config

_BACKWARD = 2.0  # a backward pass costs two forward passes
_WORK = 4000  # passes of stages that a search may simulate: some 10 ms


class BalancingConfig(Config):
    """Micro-batches of a step in the order that lets the pipeline wait least."""

    tile_cost_in_tokens: pydantic.PositiveFloat
    """What a tile costs in the vision encoder, in tokens of the language model: the floating-point operations of both
    are in ``megavlm plan``."""


@dataclass(frozen=True)
class MicroBatchCost:
    """What a forward pass of a micro-batch costs, in any unit."""

    vision: float
    """Of the vision encoder: work of the first stage only."""
    text: float
    """Of the language model: spread over all stages."""


@dataclass(frozen=True)
class PipelineTime:
    """What a step takes, in the unit of the costs."""

    span: float
    """From the first forward pass to the last backward pass."""
    idle_share: float
    """Of the stages' time."""
    passes: "list[StagePass]"
    """In no order."""


@dataclass(frozen=True)
class StagePass:
    """One pass of a micro-batch through a stage."""

    stage: int
    micro_batch: int
    """In the order of the costs."""
    is_forward: bool
    start: float
    end: float


def costs_of(batches: Sequence[Batch], config: BalancingConfig) -> list[MicroBatchCost]:
    """Count what micro-batches cost: tiles, and tokens with their padding."""
    return [
        MicroBatchCost(batch.tiles.shape[0] * config.tile_cost_in_tokens, float(batch.tokens.numel()))
        for batch in batches
    ]


def balanced_order(costs: Sequence[MicroBatchCost], num_stages: int) -> list[int]:
    """Return an order of micro-batches that waits little in :func:`simulate_pipeline`.

    The best of the given one, both orders by vision cost, heavy and light ones in turn, and Johnson's rule for two
    machines in a row (Johnson, Naval Research Logistics Quarterly 1, 1954); then pairs change places as long as that
    helps, for a limited number of trials. Never worse than the given one.

    Args:
        costs: of the micro-batches, in the given order.
        num_stages: of the pipeline.
    """
    given = list(range(len(costs)))
    if num_stages == 1:
        return given
    light_first = sorted(given, key=lambda number: costs[number].vision)
    in_turn = [
        light_first[place // 2] if place % 2 else light_first[-1 - place // 2] for place in range(len(light_first))
    ]
    light = [number for number in light_first if costs[number].vision <= costs[number].text / num_stages]
    heavy = [number for number in given if number not in light]
    johnson = light + sorted(heavy, key=lambda number: -costs[number].text)
    candidates = [given, light_first, light_first[::-1], in_turn, johnson]

    def span(order: Sequence[int]) -> float:
        return simulate_pipeline([costs[number] for number in order], num_stages).span

    best = min(candidates, key=span)
    least, num_trials = span(best), _WORK // max(1, len(costs) * num_stages)
    for first, second in itertools.islice(itertools.cycle(itertools.combinations(given, 2)), num_trials):
        swapped = list(best)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        if (found := span(swapped)) < least:
            best, least = swapped, found
    return best


def simulate_pipeline(costs: Sequence[MicroBatchCost], num_stages: int) -> PipelineTime:
    """Time a step under the 1F1B schedule (PipeDream-Flush, arXiv 2006.09503; megatron-core's without interleaving).

    The first stage has the vision encoder and its share of the language model, the others their share. Sending takes no
    time.

    Args:
        costs: of the micro-batches, in their order.
        num_stages: of the pipeline.
    """
    forwards = [
        [cost.text / num_stages + (cost.vision if stage == 0 else 0.0) for cost in costs] for stage in range(num_stages)
    ]
    schedules = [_schedule(len(costs), num_stages - stage - 1) for stage in range(num_stages)]
    ends: dict[tuple[bool, int, int], float] = {}  # (is forward, stage, micro-batch)
    passes: list[StagePass] = []
    clocks, places = [0.0] * num_stages, [0] * num_stages
    while any(place < len(schedule) for place, schedule in zip(places, schedules, strict=True)):
        for stage, schedule in enumerate(schedules):
            while places[stage] < len(schedule):
                is_forward, number = schedule[places[stage]]
                source = stage - 1 if is_forward else stage + 1
                is_edge = source in (-1, num_stages)
                if not is_edge and (is_forward, source, number) not in ends:
                    break
                ready = clocks[stage] if is_edge else max(clocks[stage], ends[is_forward, source, number])
                clocks[stage] = ready + forwards[stage][number] * (1.0 if is_forward else _BACKWARD)
                ends[is_forward, stage, number] = clocks[stage]
                passes.append(StagePass(stage, number, is_forward, ready, clocks[stage]))
                places[stage] += 1
    span = max(clocks)
    busy = sum(map(sum, forwards)) * (1.0 + _BACKWARD)
    return PipelineTime(span, 1.0 - busy / (span * num_stages) if span else 0.0, passes)


def _schedule(num_micro_batches: int, num_later_stages: int) -> list[tuple[bool, int]]:
    """What a stage does, in order: ``(is forward, micro-batch)``."""
    num_ahead = min(num_micro_batches, num_later_stages)
    steps = [(True, number) for number in range(num_ahead)]
    for number in range(num_micro_batches):
        if number + num_ahead < num_micro_batches:
            steps.append((True, number + num_ahead))
        steps.append((False, number))
    return steps
