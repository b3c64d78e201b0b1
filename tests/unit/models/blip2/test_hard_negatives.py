"""Hard negatives and the losses of pairs against what is worked out by hand."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megavlm.models.blip2.loss import contrast_loss, matching_loss
from megavlm.models.blip2.negative import choose, draw_numbers
from megavlm.runtime import process


@pytest.fixture(autouse=True, scope="module")
def _one_rank() -> Iterator[None]:
    with process.process():
        parallel_state.initialize_model_parallel()
        yield


def test_negatives_are_drawn_by_their_softmax() -> None:
    """Evenly spaced numbers give each candidate its share, and never one's own, however near it is."""
    scores = torch.tensor([9.0, 1.0, 0.0, -1.0, 2.0])
    allowed = torch.tensor([False, True, True, False, True])
    count = 10_000
    numbers = torch.arange(count, dtype=torch.float64) / count
    chosen = choose(scores.expand(count, -1), allowed.expand(count, -1), numbers)
    shares = torch.bincount(chosen, minlength=5) / count
    weights = [math.e**1.0, 1.0, math.e**2.0]
    expected = [0.0, weights[0] / sum(weights), weights[1] / sum(weights), 0.0, weights[2] / sum(weights)]
    assert shares.tolist() == pytest.approx(expected, abs=2 / count)


@pytest.mark.parametrize("number", [0.0, 0.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_one_s_own_is_never_chosen(number: float, scale: float) -> None:
    """Neither at the ends of the range nor where all shares but one underflow."""
    size = 6
    scores = scale * torch.eye(size) - scale * torch.arange(size) * 0.1
    allowed = ~torch.eye(size, dtype=torch.bool)
    chosen = choose(scores, allowed, torch.full((size,), number, dtype=torch.float64))
    assert not (chosen == torch.arange(size)).any()
    assert (chosen < size).all()


def test_of_two_pairs_the_other_is_the_negative() -> None:
    allowed = ~torch.eye(2, dtype=torch.bool)
    assert choose(torch.randn(2, 2), allowed, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist() == [1, 0]


def test_who_may_choose_nobody_gets_something() -> None:
    chosen = choose(torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool), torch.rand(2, dtype=torch.float64))
    assert ((chosen >= 0) & (chosen < 3)).all()


def test_draws_depend_on_seed_and_micro_batch_alone() -> None:
    first = draw_numbers(5, 0, 8)
    torch.manual_seed(77)
    assert torch.equal(first, draw_numbers(5, 0, 8))
    assert first.unique().numel() == 16
    others = [draw_numbers(5, 1, 8), draw_numbers(6, 0, 8), draw_numbers(5, None, 8)]
    assert all(not torch.equal(first, other) for other in others)
    assert torch.equal(others[2], draw_numbers(5, None, 8))


def test_contrast_is_cross_entropy_over_the_candidates() -> None:
    """With smoothing, as torch has it; what is no candidate is not there, and loses nothing."""
    scores = torch.randn(3, 5, requires_grad=True)
    is_candidate = torch.tensor([True, False, True, True, True])
    found = contrast_loss(scores, torch.tensor([2, 1, 4]), is_candidate, 0.1)
    kept = scores.detach()[:, is_candidate].requires_grad_()
    first = F.cross_entropy(kept[0], torch.tensor(1), label_smoothing=0.1)
    third = F.cross_entropy(kept[2], torch.tensor(3), label_smoothing=0.1)
    torch.testing.assert_close(found, torch.stack([first, torch.tensor(0.0), third]))
    found.sum().backward()
    (first + third).backward()
    assert scores.grad is not None
    assert kept.grad is not None
    torch.testing.assert_close(scores.grad[:, is_candidate], kept.grad)
    assert not scores.grad[:, 1].any()


def test_matching_by_hand() -> None:
    """Two classes: the loss is log(1 + e^-margin), a third of it from each of the pair and its two negatives."""
    margins = torch.tensor([[2.0, 0.0], [-1.0, 3.0], [0.5, 1.0]])  # of class 1 over class 0
    logits = torch.stack([torch.zeros_like(margins), margins], dim=-1)
    signs = (1, -1, -1)
    by_hand = [
        sum(math.log1p(math.exp(-sign * float(margins[kind, row]))) for kind, sign in enumerate(signs)) / 3
        for row in range(2)
    ]
    found = matching_loss(logits, torch.tensor([True, True]), torch.tensor(True))
    assert found.tolist() == pytest.approx(by_hand)
    alone = matching_loss(logits, torch.tensor([True, False]), torch.tensor(False))
    assert alone.tolist() == pytest.approx([math.log1p(math.exp(-2.0)), 0.0])
