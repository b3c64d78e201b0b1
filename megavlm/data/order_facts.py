"""What the order of a run's samples depends on, kept in checkpoints so that a resumed run can tell what has changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from megavlm.data.blend import Blend
from megavlm.data.datasets import Dataset


def order_facts(dataset: Dataset, source_names: Sequence[str], *, seed: int, shuffle: bool) -> dict[str, Any]:
    """Gather what decides which sample stands where in the sequence of a run.

    Args:
        dataset: opened training data.
        source_names: of its sources.
        seed: of the shuffle.
        shuffle: whether there is one.

    Returns:
        ``seed``, ``shuffle`` and for each source its ``rows`` and its ``share`` of the samples, as JSON has them.
    """
    sizes, shares = [len(dataset)], {source_names[0]: 1.0}
    if isinstance(dataset, Blend):
        sizes, shares = dataset.sizes, dataset.shares()
    sources = {name: {"rows": rows, "share": shares[name]} for name, rows in zip(source_names, sizes, strict=True)}
    return {"seed": seed, "shuffle": shuffle, "sources": sources}


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what differs between two results of :func:`order_facts`, one text each; none: the order is the same."""
    changes = [f"{key} {before[key]} -> {now[key]}" for key in ("seed", "shuffle") if before[key] != now[key]]
    old, new = before["sources"], now["sources"]
    changes += [f"{name} is gone" for name in old if name not in new]
    changes += [f"{name} is new ({new[name]['rows']} rows)" for name in new if name not in old]
    for name in (name for name in new if name in old):
        if old[name]["rows"] != new[name]["rows"]:
            changes.append(f"{name} rows {old[name]['rows']} -> {new[name]['rows']}")
        if old[name]["share"] != new[name]["share"]:
            changes.append(f"{name} share {100 * old[name]['share']:.2f}% -> {100 * new[name]['share']:.2f}%")
    if not changes and list(old) != list(new):
        changes.append(f"sources in another order: {', '.join(old)} -> {', '.join(new)}")
    return changes
