"""What a resumed run tells of data that are not those it had."""

import copy
import logging
from typing import Any

import pytest

from megavlm.data import Blend, BlendConfig, describe_changes, order_facts
from megavlm.training.feeding import tell_other_order


class Rows:
    num_bad_rows = 0
    bad_rows: list[str] = []

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def blend(sizes: dict[str, int], weights: list[float]) -> Any:
    sources = [
        {"name": name, "weight": weight, "dataset": {"kind": "jsonl", "path": f"{name}.jsonl"}}
        for name, weight in zip(sizes, weights, strict=True)
    ]
    return Blend(BlendConfig.model_validate({"sources": sources}), [Rows(size) for size in sizes.values()])


BEFORE = order_facts(blend({"a": 10, "b": 20}, [1, 3]), ["a", "b"], seed=5, shuffle=True)


def test_facts_of_a_blend_and_of_one_data_set() -> None:
    assert BEFORE["sources"] == {"a": {"rows": 10, "share": 0.25}, "b": {"rows": 20, "share": 0.75}}
    single = order_facts(Rows(7), ["train.jsonl"], seed=5, shuffle=False)
    assert single == {"seed": 5, "shuffle": False, "sources": {"train.jsonl": {"rows": 7, "share": 1.0}}}


@pytest.mark.parametrize(
    ("now", "changes"),
    [
        (copy.deepcopy(BEFORE), []),
        ({**BEFORE, "seed": 6, "shuffle": False}, ["seed 5 -> 6", "shuffle True -> False"]),
        (
            order_facts(blend({"a": 11, "b": 20}, [1, 3]), ["a", "b"], seed=5, shuffle=True),
            ["a rows 10 -> 11"],
        ),
        (
            order_facts(blend({"a": 10, "b": 20}, [1, 1]), ["a", "b"], seed=5, shuffle=True),
            ["a share 25.00% -> 50.00%", "b share 75.00% -> 50.00%"],
        ),
        (
            order_facts(blend({"b": 20, "c": 4}, [3, 1]), ["b", "c"], seed=5, shuffle=True),
            ["a is gone", "c is new (4 rows)"],
        ),
        (
            order_facts(blend({"b": 20, "a": 10}, [3, 1]), ["b", "a"], seed=5, shuffle=True),
            ["sources in another order: a, b -> b, a"],
        ),
    ],
)
def test_changes_are_named(now: dict[str, Any], changes: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert describe_changes(BEFORE, now) == changes
    with caplog.at_level(logging.WARNING, logger="megavlm"):
        tell_other_order(BEFORE, now)
    assert [change for change in changes if change not in caplog.text] == []
    assert bool(caplog.records) == bool(changes)
