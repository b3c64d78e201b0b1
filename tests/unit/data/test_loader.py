"""The loader: one order for every layout, exact resumption, and failures that are seen."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import chat

from megavlm.batch import Batch
from megavlm.data import DATASETS, Conversation, Dataset, Loader, Message, SampleProcessor

NUM_ROWS = 23
MakeLoader = Callable[..., Loader]


@pytest.fixture
def dataset(write_rows: Callable[..., Path], write_image: Callable[..., Path]) -> Dataset:
    """23 rows, whose answers are their numbers; every third has an image."""
    images = [str(write_image(f"{size}.png", size, 8)) for size in (8, 16, 24)]
    rows = [
        chat("<image>Q", f"#{n}", [images[n % 9 // 3]]) if n % 3 == 0 else chat("Q", f"#{n}") for n in range(NUM_ROWS)
    ]
    return DATASETS["jsonl"].model_validate({"path": write_rows(rows)}).build()


@pytest.fixture
def make_loader(dataset: Dataset, make_processor: Callable[..., SampleProcessor]) -> MakeLoader:
    """A loader of global batches of 8 on one rank; settings of :class:`Loader` by name."""

    def make(source: Dataset = dataset, processor: SampleProcessor | None = None, **settings: Any) -> Loader:
        defaults = {"micro_batch_size": 2, "global_batch_size": 8, "seed": 5}
        ranks = {"data_parallel_rank": 0, "data_parallel_size": 1}
        return Loader(source, processor or make_processor(), **defaults | ranks | settings)

    return make


def answers(batch: Batch) -> list[str]:
    """What each row trains; empty rows give an empty string."""
    texts = []
    for labels, mask in zip(batch.labels, batch.loss_mask, strict=True):
        trained = labels[mask.bool()].tolist()
        texts.append(bytes(token - 4 for token in trained[:-2]).decode())  # without <|im_end|> and the line break
    return texts


def steps(loader: Loader, count: int) -> list[list[Batch]]:
    return list(itertools.islice(iter(loader), count))


def global_batches(make_loader: MakeLoader, count: int, data_parallel_size: int, **settings: Any) -> list[list[str]]:
    """The answers of each step, in the order of the global batch."""
    ranks = [
        steps(make_loader(data_parallel_rank=rank, data_parallel_size=data_parallel_size, **settings), count)
        for rank in range(data_parallel_size)
    ]
    return [
        [text for micro_batches in zip(*step, strict=True) for batch in micro_batches for text in answers(batch)]
        for step in zip(*ranks, strict=True)
    ]


@pytest.fixture
def reference(make_loader: MakeLoader) -> list[list[str]]:
    """Seven steps of 8: more than two epochs of 23 rows."""
    return global_batches(make_loader, 7, 1)


@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_order_for_every_layout(
    make_loader: MakeLoader, reference: list[list[str]], data_parallel_size: int, num_workers: int
) -> None:
    found = global_batches(make_loader, 7, data_parallel_size, num_workers=num_workers)
    assert found == reference


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_the_micro_batch_size_does_not_change_the_order(
    make_loader: MakeLoader, reference: list[list[str]], micro_batch_size: int
) -> None:
    assert global_batches(make_loader, 7, 1, micro_batch_size=micro_batch_size) == reference


def test_each_epoch_uses_every_row_once_in_another_order(reference: list[list[str]]) -> None:
    stream = [text for step in reference for text in step]
    first, second = stream[:NUM_ROWS], stream[NUM_ROWS : 2 * NUM_ROWS]
    assert sorted(first) == sorted(second) == sorted(f"#{n}" for n in range(NUM_ROWS))
    assert first != second
    assert first != sorted(first, key=lambda text: int(text[1:]))


def test_without_shuffling_the_file_s_order_is_kept(make_loader: MakeLoader) -> None:
    found = global_batches(make_loader, 3, 1, shuffle=False)
    assert [text for step in found for text in step] == [f"#{n % NUM_ROWS}" for n in range(24)]


@pytest.mark.parametrize("data_parallel_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_done", [1, 3, 4])
def test_resumption_goes_on_with_the_next_sample(
    make_loader: MakeLoader, reference: list[list[str]], data_parallel_size: int, num_workers: int, num_done: int
) -> None:
    """Stopped in the first epoch, at its seam and in the second; resumed with other ranks and workers."""
    loader = make_loader()
    assert len(steps(loader, num_done)) == num_done
    assert loader.consumed_samples == 8 * num_done
    settings = {"consumed_samples": loader.consumed_samples, "num_workers": num_workers}
    assert global_batches(make_loader, 7 - num_done, data_parallel_size, **settings) == reference[num_done:]


def test_resumed_batches_are_equal_to_the_bit(make_loader: MakeLoader) -> None:
    whole = steps(make_loader(), 5)[3:]
    resumed = steps(make_loader(consumed_samples=24, num_workers=1), 2)
    for expected, found in zip(itertools.chain(*whole), itertools.chain(*resumed), strict=True):
        for name, tensor in expected.tensors().items():
            assert torch.equal(tensor, found.tensors()[name]), name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_endless_loader_goes_on_where_it_was_left(
    make_loader: MakeLoader, reference: list[list[str]], num_workers: int
) -> None:
    """What workers had made ahead when an iteration was left must neither be lost nor come twice."""
    loader = make_loader(num_workers=num_workers)
    found = [
        [text for batch in step for text in answers(batch)] for count in (2, 1, 3) for step in steps(loader, count)
    ]
    assert found == reference[:6]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("data_parallel_size", [1, 2])
def test_a_single_pass_ends_with_empty_rows(make_loader: MakeLoader, data_parallel_size: int, num_workers: int) -> None:
    settings = {"endless": False, "shuffle": False, "num_workers": num_workers}
    found = global_batches(make_loader, 99, data_parallel_size, **settings)
    assert [len(step) for step in found] == [8, 8, 8]
    assert [text for step in found for text in step] == [f"#{n}" for n in range(NUM_ROWS)] + [""]
    loader = make_loader(**settings, data_parallel_size=data_parallel_size)
    assert len(loader) == 3
    for _ in range(2):  # each iteration is a pass of its own
        batches = [batch for step in loader for batch in step]
        assert len(batches) == 12 // data_parallel_size
        assert all(not batch.skipped for batch in batches)


def test_an_endless_loader_has_no_length(make_loader: MakeLoader) -> None:
    with pytest.raises(TypeError, match="this loader is endless"):
        len(make_loader())


def test_torch_s_random_numbers_are_left_alone(make_loader: MakeLoader) -> None:
    """A resumed run must draw the same dropout masks as one that was not stopped."""
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        steps(make_loader(num_workers=num_workers), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_can_all_have_one_length(make_loader: MakeLoader) -> None:
    for step in steps(make_loader(pad_multiple=128), 3):
        assert {batch.tokens.shape for batch in step} == {(2, 128)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_failing_sample_is_an_empty_row_and_is_reported(
    write_rows: Callable[..., Path],
    write_image: Callable[..., Path],
    make_loader: MakeLoader,
    make_processor: Callable[..., SampleProcessor],
    num_workers: int,
) -> None:
    broken = write_image("broken.png", 30, 30)
    broken.write_bytes(broken.read_bytes()[:200])
    path = write_rows(
        [chat("Q", "#0"), chat("<image>Q", "#1", [str(broken)]), chat("Q" * 300, "#2"), chat("Q", "#3")], "four.jsonl"
    )
    dataset = DATASETS["jsonl"].model_validate({"path": path}).build()
    processor = make_processor(seq_length=200)
    loader = make_loader(dataset, processor, shuffle=False, global_batch_size=4, num_workers=num_workers, endless=False)
    first, second = next(iter(loader))
    assert answers(first) == ["#0", ""]
    assert answers(second) == ["", "#3"]
    assert [(entry.key, entry.reason) for entry in first.skipped] == [(f"{path}:2", "image_unreadable")]
    assert [(entry.key, entry.reason) for entry in second.skipped] == [(f"{path}:3", "over_length")]
    assert first.tokens[1].tolist() == [0] * first.tokens.shape[1]


def test_a_row_that_goes_bad_is_reported(write_rows: Callable[..., Path], make_loader: MakeLoader) -> None:
    path = write_rows([chat("Q", f"#{n}") for n in range(4)], "four.jsonl")
    dataset = DATASETS["jsonl"].model_validate({"path": path}).build()
    path.write_text("changed\n" * 200)
    (batch,) = next(iter(make_loader(dataset, micro_batch_size=2, global_batch_size=2, shuffle=False)))
    assert answers(batch) == ["", ""]
    assert [entry.reason for entry in batch.skipped] == ["row_malformed", "row_malformed"]
    assert "four.jsonl:1: is not valid JSON" in batch.skipped[0].message


def test_degraded_images_are_counted(
    make_loader: MakeLoader,
    make_processor: Callable[..., SampleProcessor],
    write_rows: Callable[..., Path],
    write_image: Callable[..., Path],
) -> None:
    path = write_rows([chat("<image>Q", "A", [str(write_image("wide.png", 24, 16))])] * 4, "four.jsonl")
    dataset = DATASETS["jsonl"].model_validate({"path": path}).build()
    loader = make_loader(dataset, make_processor(seq_length=100), global_batch_size=2)
    assert sum(batch.num_degraded for step in itertools.islice(loader, 2) for batch in step) == 4


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"global_batch_size": 10, "data_parallel_size": 4},
            "global_batch_size=10: is not a multiple .* 2 x 4 = 8. .* 8 and 16",
        ),
        ({"global_batch_size": 1}, "global_batch_size=1: is not a multiple of .* = 2 x 1 = 2"),
        ({"micro_batch_size": 0}, "micro_batch_size=0, global_batch_size=8, .* must all be 1 or more"),
        ({"data_parallel_rank": 2, "data_parallel_size": 2}, "data_parallel_rank=2: must be from 0 to .* = 1"),
        ({"consumed_samples": -8}, "consumed_samples=-8: is below 0"),
        ({"source": []}, "dataset: has 0 rows"),
    ],
)
def test_wrong_settings(make_loader: MakeLoader, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_loader(**settings)


class Hooked:
    """A dataset that does something on one row."""

    num_bad_rows, bad_rows = 0, []

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[str, Conversation]:
        if index == 3:
            self._action()
        return f"k{index}", Conversation((Message("user", ("Q",)), Message("assistant", ("A",))))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("action", "match"),
    [(die, "worker .* (is killed by signal|exited unexpectedly)"), (hang, "timed out after 2 seconds")],
)
def test_a_dead_worker_is_an_error(make_loader: MakeLoader, action: Callable[[], None], match: str) -> None:
    settings = {"global_batch_size": 2, "shuffle": False, "num_workers": 1, "timeout_seconds": 2}
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=match):
        steps(make_loader(Hooked(action), **settings), 2)
    assert time.monotonic() - began < 30


def test_a_fault_of_ours_is_not_taken_for_bad_data(make_loader: MakeLoader) -> None:
    def fail() -> None:
        raise AssertionError("broken")

    with pytest.raises(AssertionError, match="broken"):
        steps(make_loader(Hooked(fail), shuffle=False), 1)


def test_workers_ignore_the_signals_that_stop_training(make_loader: MakeLoader) -> None:
    def provoke() -> None:
        for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), name)

    found = steps(make_loader(Hooked(provoke), shuffle=False, num_workers=1), 2)
    assert [answers(batch) for batch in found[0]] == [["A", "A"]] * 4


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(torch.multiprocessing.active_children())  # ranks that other tests keep
    yield
    for child in set(torch.multiprocessing.active_children()) - before:
        child.join(timeout=10)
        assert not child.is_alive()
