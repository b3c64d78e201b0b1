"""Lock-step guard: before the collectives of a step the ranks compare what they are about to do.

Ranks that disagree on the number of micro-batches, or ranks of one model replica that disagree on their shapes, would
wait for each other until a timeout, or compute with garbage. Four integers of each rank are compared before every step;
only when they differ are the details exchanged, and every rank raises the same error.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from megavlm.batch import Batch
from megavlm.runtime.sign import name_ranks

_MOST_KEYS = 8  # sample keys that an error names for each rank


@dataclass(frozen=True)
class Plan:
    """What a rank is about to do."""

    step: int
    replica: int
    """Data-parallel rank: ranks of one replica work on the same micro-batches."""
    shapes: tuple[dict[str, Any], ...]
    """What must be the same of each micro-batch on all ranks of a replica."""
    keys: tuple[tuple[str, ...], ...]
    """Samples of each micro-batch."""

    @classmethod
    def of(cls, batches: Sequence[Batch], step: int, replica: int) -> "Plan":
        """The plan of a rank that has these micro-batches. Looks at shapes only, so a GPU is not waited for."""
        shapes = tuple(_shapes(batch) for batch in batches)
        return cls(step, replica, shapes, tuple(tuple(batch.keys) for batch in batches))

    def digest(self) -> list[int]:
        """Step, number of micro-batches, replica, and 63 bits of the shapes."""
        hashed = hashlib.blake2b(repr(self.shapes).encode(), digest_size=8).digest()
        return [self.step, len(self.shapes), self.replica, int.from_bytes(hashed, "big") >> 1]


def _shapes(batch: Batch) -> dict[str, Any]:
    # not of the tiles: they are on the first pipeline stage only
    return {
        "rows x tokens": tuple(batch.tokens.shape),
        "context length": batch.context_length,
        "images": batch.tiles_per_image.numel(),
        "tiles with a context": batch.tile_rows.numel(),
        "samples": batch.cu_seqlens.numel() - 1,
        "packed": batch.is_packed,
    }


def check_lockstep(batches: Sequence[Batch], *, step: int, replica: int, device: torch.device) -> None:
    """Compare this step with the other ranks'. Collective over all ranks.

    Args:
        batches: of this rank.
        step: number of the step.
        replica: data-parallel rank of this rank.
        device: of the collective.

    Raises:
        ValueError: the ranks are about to do different things. The same text on every rank: who, what, which samples.
    """
    world_size = torch.distributed.get_world_size()
    if world_size == 1:
        return
    plan = Plan.of(batches, step, replica)
    mine = torch.tensor(plan.digest(), dtype=torch.int64, device=device)
    everyone = torch.empty(world_size * mine.numel(), dtype=torch.int64, device=device)
    torch.distributed.all_gather_into_tensor(everyone, mine)
    if not _differ(everyone.view(world_size, -1).tolist()):
        return
    plans: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(plans, plan)
    raise ValueError(describe(dict(enumerate(plans))))


def _differ(digests: Sequence[Sequence[int]]) -> bool:
    steps = {(step, num_micro_batches) for step, num_micro_batches, _, _ in digests}
    return len(steps) > 1 or len({(replica, shapes) for _, _, replica, shapes in digests}) > len(
        {replica for _, _, replica, _ in digests}
    )


def describe(plans: Mapping[int, Plan]) -> str:
    """Say who differs from most ranks, in what, and which samples those ranks have.

    Args:
        plans: by rank; they differ.
    """
    for name, value in (
        ("step", lambda plan: plan.step),
        ("number of micro-batches", lambda plan: len(plan.shapes)),
    ):
        if text := _say_difference(name, plans, value, lambda plan: _first_keys(plan.keys)):
            return _sentence(plans, text)
    for replica in sorted({plan.replica for plan in plans.values()}):
        members = {rank: plan for rank, plan in plans.items() if plan.replica == replica}
        for number, shapes in enumerate(next(iter(members.values())).shapes):
            for name in shapes:
                if (
                    text := _say_difference(
                        f"micro-batch {number + 1} of model replica {replica}: {name}",
                        members,
                        lambda plan, number=number, name=name: plan.shapes[number][name],  # type: ignore[misc]
                        lambda plan, number=number: _first_keys(plan.keys[number : number + 1]),  # type: ignore[misc]
                    )
                ):
                    return _sentence(plans, text)
    raise AssertionError("the plans do not differ")


def _sentence(plans: Mapping[int, Plan], difference: str) -> str:
    step = min(plan.step for plan in plans.values())
    return (
        f"step {step}: the ranks are not about to do the same work, and would wait for each other for ever. "
        f"{difference} Check that every node reads the same data and recipe (megavlm preflight); the run resumes from "
        "its newest checkpoint."
    )


def _say_difference(
    name: str, plans: Mapping[int, Plan], value: Callable[[Plan], Hashable], samples: Callable[[Plan], str]
) -> str | None:
    """``number of micro-batches: 2 on ranks 0-2, 4 on rank 3 (samples: a.jsonl:7)``; None if it is the same."""
    counted = Counter(value(plan) for plan in plans.values()).most_common()
    if len(counted) == 1:
        return None
    is_tie = counted[0][1] == counted[1][1]
    parts = []
    for number, (what, _) in enumerate(counted):
        ranks = [rank for rank, plan in plans.items() if value(plan) == what]
        is_usual = number == 0 and not is_tie
        parts.append(f"{what} on {name_ranks(ranks)}" + ("" if is_usual else f" ({samples(plans[ranks[0]])})"))
    return f"{name}: {'; '.join(parts)}."


def _first_keys(keys: Sequence[Sequence[str]]) -> str:
    flat = [key for batch in keys for key in batch]
    if not flat:
        return "no sample"
    more = f" and {len(flat) - _MOST_KEYS} more" if len(flat) > _MOST_KEYS else ""
    return f"samples {', '.join(flat[:_MOST_KEYS])}{more}"
