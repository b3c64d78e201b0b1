"""Prompts are shared over replicas: each is answered once, and every rank gets the same results."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from megavlm.inference.shared import Done, answer_shared


class Replicas:
    """Threads that stand for data-parallel ranks and gather like them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=10)
        self._slots: list[Any] = [None] * size

    def parts(self, rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            self._slots[rank] = value
            self._barrier.wait()
            values = list(self._slots)
            self._barrier.wait()
            return values

        engine = SimpleNamespace(data_parallel_size=self.size, data_parallel_rank=rank, gather_over_replicas=gather)
        return SimpleNamespace(engine=engine)


def run(
    size: int, numbers: Sequence[int], batch_size: int
) -> tuple[list[list[list[tuple[int, str]]]], list[list[int]]]:
    """What each rank got, and the lengths of every batch; every fifth number cannot be asked."""
    replicas = Replicas(size)
    batches: list[list[int]] = []
    got: list[list[list[tuple[int, str]]]] = [[] for _ in range(size)]

    def read(number: int) -> Any:
        return Done(f"no {number}") if number % 5 == 0 else SimpleNamespace(num_tokens=number * 7 % 11, number=number)

    def answer(prompts: Sequence[tuple[int, Any]]) -> list[str]:
        batches.append([sample.num_tokens for _, sample in prompts])
        return [f"yes {sample.number}" for _, sample in prompts]

    def rank(index: int) -> None:
        got[index] = list(answer_shared(replicas.parts(index), numbers, read, answer, batch_size=batch_size))

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return got, batches


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 61])
def test_each_is_answered_once(size: int, count: int) -> None:
    numbers = range(100, 100 + count)
    got, batches = run(size, numbers, batch_size=4)
    assert all(rank == got[0] for rank in got)
    together = [entry for came in got[0] for entry in came]
    assert sorted(together) == [(n, f"no {n}" if n % 5 == 0 else f"yes {n}") for n in numbers]
    assert all(came == sorted(came) for came in got[0])
    assert all(1 <= len(batch) <= 4 and batch == sorted(batch, reverse=True) for batch in batches)


def test_what_cannot_be_read_stops_all() -> None:
    def read(number: int) -> Any:
        raise ValueError(f"row {number}: is gone.")

    with pytest.raises(ValueError, match="row 3: is gone"):
        list(answer_shared(Replicas(1).parts(0), [3], read, lambda prompts: [], batch_size=2))
