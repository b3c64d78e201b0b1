"""Packing: full rows, one order for every layout, and exact resumption by hashes of tokens and pixels."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import TILE_SIZE, chat

from megavlm.batch import Batch
from megavlm.data import (
    Blend,
    BlendConfig,
    LaneProgress,
    Loader,
    PackedLoader,
    PackingConfig,
    Progress,
    SampleProcessor,
)
from megavlm.data.packing import Candidate, RowPacker

SEQ_LENGTH = 200
MakeLoader = Callable[..., Loader | PackedLoader]


# ---- which samples share a row ---------------------------------------------------------------------------------------


def packer(sizes: list[tuple[int, int]], capacity: int = 10, **config: Any) -> RowPacker:
    """Rows of samples of ``(tokens, tiles)``, again and again."""
    endless = (Candidate(number, *size) for number, size in enumerate(itertools.cycle(sizes)))
    return RowPacker(endless, PackingConfig(**config), capacity)


def rows(source: RowPacker, count: int) -> list[list[int]]:
    return [[sample.position for sample in source.next_row()] for _ in range(count)]


def test_the_oldest_comes_first_then_the_longest_that_fits() -> None:
    # of 4 samples ahead: 0 (4 tokens) opens; 6 fits (2), then nothing; 1 (5) opens with 4 (5) of what came meanwhile
    found = rows(packer([(4, 0), (5, 0), (6, 0), (9, 0), (5, 0), (1, 0), (1, 0), (1, 0)], buffer_size=4), 3)
    assert found == [[0, 2], [1, 4], [3, 5]]


def test_a_buffer_of_one_keeps_the_order() -> None:
    found = rows(packer([(4, 0), (5, 0), (6, 0), (9, 0)], buffer_size=1), 4)
    assert list(itertools.chain(*found)) == sorted(itertools.chain(*found))


def test_a_row_has_at_most_so_many_tiles_but_a_sample_is_never_refused() -> None:
    found = packer([(2, 3), (2, 3), (2, 1), (2, 9)], max_tiles_per_row=4, buffer_size=8)
    for _ in range(20):
        row = found.next_row()
        assert sum(sample.num_tiles for sample in row) <= 4 or len(row) == 1


def test_every_sample_comes_once_and_none_waits_for_ever() -> None:
    source = packer([(7, 0), (3, 0), (10, 0), (1, 0), (6, 0)], buffer_size=6)
    found = rows(source, 400)
    used = sorted(itertools.chain(*found))
    waiting = [sample.position for sample in source.buffer]
    assert sorted([*used, *waiting]) == list(range(len(used) + len(waiting)))
    # a row at least takes the oldest, so none waits longer than the buffer is long
    last = {position: number for number, row in enumerate(found) for position in row}
    first_behind = [min(last[later] for later in range(position + 1, position + 20)) for position in range(300)]
    assert all(last[position] <= first + 6 for position, first in enumerate(first_behind))


def test_samples_that_cannot_be_used_neither_fill_rows_nor_hold_them_up() -> None:
    assert len(packer([(0, 0)], buffer_size=5).next_row()) == 6
    row = packer([(0, 0), (6, 0), (4, 0)], buffer_size=4).next_row()
    assert sum(sample.num_tokens for sample in row) == 10


# ---- the loader ------------------------------------------------------------------------------------------------------


@pytest.fixture
def blend(write_rows: Callable[..., Path], write_image: Callable[..., Path]) -> Blend:
    """Two sources of 19 and 7 samples of many lengths; each third of the first has one or two images."""
    images = [str(write_image(f"{size}.png", size * TILE_SIZE, TILE_SIZE)) for size in (1, 2, 3)]
    chosen = [[], images[:1], images[1:]]
    captions = [
        chat("<image>" * len(chosen[n % 3]) + "Q", f"c{n}" + "x" * (n * 7 % 40), chosen[n % 3]) for n in range(19)
    ]
    captions[5]["image"] = [str(write_image("broken.png", 8, 8))]
    captions[5]["conversations"][0]["value"] = "<image>"
    paths = [
        write_rows(captions, "captions.jsonl"),
        write_rows([chat("Q", f"t{n}" + "y" * (n * 11 % 50)) for n in range(7)], "texts.jsonl"),
    ]
    Path(captions[5]["image"][0]).write_bytes(b"no image")
    sources = [
        {"dataset": {"kind": "jsonl", "path": path}, "weight": weight}
        for path, weight in zip(paths, (3, 1), strict=True)
    ]
    return BlendConfig.model_validate({"sources": sources}).build()


@pytest.fixture
def make_loader(blend: Blend, make_processor: Callable[..., SampleProcessor]) -> MakeLoader:
    """A loader of 8 rows a step; settings of the loaders by name."""

    def make(*, packed: bool = True, **settings: Any) -> Loader | PackedLoader:
        defaults = {"micro_batch_size": 2, "global_batch_size": 8, "seed": 5}
        ranks = {"data_parallel_rank": 0, "data_parallel_size": 1}
        processor = make_processor(seq_length=SEQ_LENGTH)
        if not packed:
            return Loader(blend, processor, **defaults | ranks | settings)
        return PackedLoader(blend, processor, PackingConfig(buffer_size=6), **defaults | ranks | settings)

    return make


def digest(batch: Batch) -> str:
    """A hash of everything in a batch, pixels included."""
    summary = hashlib.sha256(repr(batch.skipped).encode())
    for name, tensor in batch.tensors().items():
        summary.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return summary.hexdigest()


def run(
    make_loader: MakeLoader, count: int, data_parallel_size: int = 1, **settings: Any
) -> tuple[list[list[Batch]], Progress]:
    """The micro-batches of each step of all ranks, in their order, and where the ranks then are."""
    loaders = [
        make_loader(data_parallel_rank=rank, data_parallel_size=data_parallel_size, **settings)
        for rank in range(data_parallel_size)
    ]
    ranks = [list(itertools.islice(iter(loader), count)) for loader in loaders]
    steps = [
        [batch for micro_batches in zip(*step, strict=True) for batch in micro_batches]
        for step in zip(*ranks, strict=True)
    ]
    return steps, Progress.gathered([loader.lanes for loader in loaders])


def digests(steps: list[list[Batch]]) -> list[list[str]]:
    return [[digest(batch) for batch in step] for step in steps]


def samples(steps: list[list[Batch]]) -> Counter[str]:
    """How often each sample was trained, by its answer; unusable ones by their key."""
    found: Counter[str] = Counter()
    for batch in itertools.chain(*steps):
        found.update(entry.key.split(":")[-1] for entry in batch.skipped)
        labels, mask = batch.labels.flatten(), batch.loss_mask.flatten().bool()
        for start, stop in itertools.pairwise(batch.cu_seqlens.tolist()):
            trained = labels[start:stop][mask[start:stop]].tolist()
            if trained:
                found[bytes(token - 4 for token in trained[:-2]).decode()] += 1
    return found


@pytest.mark.parametrize(("data_parallel_size", "num_workers"), [(1, 2), (2, 0), (4, 0), (2, 1)])
def test_no_layout_changes_what_a_step_holds(
    make_loader: MakeLoader, data_parallel_size: int, num_workers: int
) -> None:
    expected, progress = run(make_loader, 4)
    found, found_progress = run(make_loader, 4, data_parallel_size, num_workers=num_workers)
    assert digests(found) == digests(expected)
    assert found_progress == progress


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("data_parallel_size", "num_workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_a_run_goes_on_exactly(
    make_loader: MakeLoader, data_parallel_size: int, num_workers: int, packed: bool
) -> None:
    """Stopped in the middle of an epoch with 2 ranks or 1, and resumed with as many or others."""
    expected, end = run(make_loader, 6, packed=packed)
    for ranks_before, workers_before in ((1, 0), (2, 2)):
        before, progress = run(make_loader, 2, ranks_before, num_workers=workers_before, packed=packed)
        saved = Progress.from_json(progress.to_json())
        settings = {"num_workers": num_workers, "progress": saved, "packed": packed}
        after, found_end = run(make_loader, 4, data_parallel_size, **settings)
        assert digests(before + after) == digests(expected)
        assert found_end == end


def test_an_iteration_that_was_left_goes_on(make_loader: MakeLoader) -> None:
    expected, _ = run(make_loader, 5)
    loader = make_loader()
    found = [step for count in (2, 1, 2) for step in itertools.islice(iter(loader), count)]
    assert digests(found) == digests(expected)


def test_rows_are_full_and_keep_to_their_length(make_loader: MakeLoader) -> None:
    steps, _ = run(make_loader, 12)
    batches = list(itertools.chain(*steps))
    assert max(batch.tokens.shape[1] for batch in batches) <= SEQ_LENGTH
    num_tokens = sum(int(batch.num_tokens) for batch in batches)
    fill = num_tokens / (len(batches) * 2 * SEQ_LENGTH)
    assert fill > 0.9, fill
    unpacked, _ = run(make_loader, 12, packed=False)
    alone = sum(int(batch.num_tokens) for batch in itertools.chain(*unpacked))
    assert fill > 1.5 * alone / (len(batches) * 2 * SEQ_LENGTH), alone


def test_a_sample_that_cannot_be_used_is_reported_and_takes_no_room(make_loader: MakeLoader) -> None:
    steps, _ = run(make_loader, 10)
    skipped = [entry for batch in itertools.chain(*steps) for entry in batch.skipped]
    assert {(entry.key.split(":")[-1], entry.reason) for entry in skipped} == {("6", "image_unreadable")}
    assert len(skipped) > 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"packed": True}, {"packed": False}),
        ({"packed": False}, {"packed": True}),
        ({"packed": True}, {"packed": True, "micro_batch_size": 1}),
        ({"packed": True}, {"packed": True, "global_batch_size": 4}),
    ],
)
def test_another_packing_or_batch_loses_and_repeats_no_sample(
    make_loader: MakeLoader, first: dict[str, Any], second: dict[str, Any]
) -> None:
    before, progress = run(make_loader, 3, **first)
    after, end = run(make_loader, 5, **second, progress=progress)
    stop = max(lane.next_position for lane in end.lanes)
    used = samples(before) + samples(after)
    pending = [position for lane in end.dealt_to(1).lanes for position in lane.pending]
    left, _ = (
        run(make_loader, len(pending), packed=False, micro_batch_size=1, global_batch_size=1, progress=end)
        if pending
        else ([], None)
    )
    expected, _ = run(make_loader, stop, packed=False, micro_batch_size=1, global_batch_size=1)
    assert used + samples(left) == samples(expected)


def test_sources_are_told(make_loader: MakeLoader) -> None:
    steps, _ = run(make_loader, 3)
    for batch in itertools.chain(*steps):
        for number, (start, stop) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
            labels = batch.labels.flatten()[start:stop]
            trained = labels[batch.loss_mask.flatten()[start:stop].bool()].tolist()
            if trained:
                assert chr(trained[0] - 4) == "ct"[int(batch.sources[number])]


def test_torch_s_random_numbers_are_left_alone(make_loader: MakeLoader) -> None:
    before = torch.get_rng_state()
    run(make_loader, 2, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_settings(make_loader: MakeLoader) -> None:
    with pytest.raises(ValueError, match=r"global_batch_size=7: is not a multiple of .* 2 x 1 = 2"):
        make_loader(global_batch_size=7)
    with pytest.raises(ValueError, match="buffer_size"):
        PackingConfig(buffer_size=0)


def test_progress_names_what_waits(make_loader: MakeLoader) -> None:
    _, progress = run(make_loader, 1)
    assert len(progress.lanes) == 4
    assert all(isinstance(lane, LaneProgress) and len(lane.pending) == 6 for lane in progress.lanes)
