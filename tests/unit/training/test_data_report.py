"""Padding, samples in a row and shares of sources, counted from batches made by hand."""

from collections.abc import Sequence

import pytest
import torch

from megavlm.batch import Batch, SkippedSample
from megavlm.data import Sample, pack
from megavlm.engines import StepResult
from megavlm.training.data_report import DataReport

NOTHING = torch.zeros(0, dtype=torch.int64)


class TwoReplicas:
    """An engine's sums over two ranks that hold the same."""

    def sum_over_replicas(self, numbers: Sequence[float]) -> list[float]:
        return [2 * number for number in numbers]


def sample(length: int, num_trained: int, source: int) -> Sample:
    mask = torch.zeros(length)
    mask[:num_trained] = 0.5  # weights do not count
    pairs = torch.zeros(0, 2, dtype=torch.int64)
    return Sample(
        key="k",
        tokens=torch.ones(length, dtype=torch.int64),
        labels=torch.ones(length, dtype=torch.int64),
        loss_mask=mask,
        visible_tiles=torch.zeros(length, 2, dtype=torch.int64),
        tile_spans=pairs,
        tile_context=NOTHING,
        tile_tags=pairs,
        tiles=torch.zeros(0, 3, 4, 4, dtype=torch.uint8),
        tiles_per_image=NOTHING,
        tokens_per_image=(),
        source=source,
    )


def batch(*rows: list[Sample | SkippedSample]) -> Batch:
    return pack(rows, pad_id=0, tile_size=4)


def test_shares_of_sources_leave_out_padding_and_skipped_rows() -> None:
    report = DataReport(TwoReplicas(), ["a", "b", "unseen"], seq_length=10)
    skipped = SkippedSample("k", "image_missing", "gone")
    first = batch([sample(3, 1, 1), sample(5, 2, 0)], [sample(2, 2, 1)])
    second = batch([skipped], [sample(4, 0, 1), skipped])
    report.add(StepResult(1.0, 5, 1.0, None, (4.0, 12.0, 0.0)), [first])
    report.add(StepResult(0.0, 5, 1.0, None, (4.0, 0.0, 0.0)), [second])
    numbers = report.take()
    assert numbers is not None
    a, b, unseen = numbers.sources
    assert (a.sample_share, a.token_share, a.trained_token_share) == pytest.approx((1 / 4, 5 / 14, 2 / 5))
    assert (b.sample_share, b.token_share, b.trained_token_share) == pytest.approx((3 / 4, 9 / 14, 3 / 5))
    # losses are sums over all ranks already, trained tokens are counted on each
    assert (a.loss, b.loss) == pytest.approx((8.0 / 4, 12.0 / 6))
    assert unseen.loss is None
    assert numbers.padding_share == pytest.approx(1 - 14 / (16 + 8))
    assert numbers.samples_per_row == 1.0
    assert numbers.row_fill == pytest.approx(14 / 40)
    assert a.log_text() == "a: 25.00% / 35.71% / 40.00%, loss 2.0000"
    assert unseen.log_text().endswith("loss -")
    assert report.take() is None  # begins anew


def test_one_source_is_not_listed() -> None:
    report = DataReport(TwoReplicas(), ["a"], seq_length=10)
    report.add(StepResult(1.0, 5, 1.0, None), [batch([sample(3, 1, 0), sample(5, 2, 0)])])
    numbers = report.take()
    assert numbers is not None
    assert numbers.sources == []
    assert numbers.log_text(is_packed=True) == " padding: 0.0% | samples per row: 2.00 | row fill: 80.0% |"
    assert numbers.log_text(is_packed=False) == " padding: 0.0% |"
    assert set(numbers.points()) == {"padding-share", "samples-per-row", "row-fill"}


def test_without_batches_there_is_nothing_to_say() -> None:
    report = DataReport(TwoReplicas(), ["a"], seq_length=10)
    report.add(StepResult(1.0, 5, 1.0, None), [])
    assert report.take() is None
