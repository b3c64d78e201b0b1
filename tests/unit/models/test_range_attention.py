"""Attention to ranges of the context, against sums written out."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from megavlm.models.cross_attention import (
    GatedResidual,
    RangeAttention,
    compiled_flex_attention,
    range_block_mask,
    range_mask,
)

TOKENS, ROWS, CONTEXT, HEADS, GROUPS, CHANNELS = 9, 3, 13, 4, 2, 16


def config(**settings: object) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1, hidden_size=HEADS * CHANNELS, num_attention_heads=HEADS, num_query_groups=GROUPS, **settings
    )


def attention() -> RangeAttention:
    return RangeAttention(config(attention_dropout=0.0), 1, AttnMaskType.no_mask, "cross")


def random_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and ranges, of which some are empty and some whole."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(TOKENS, ROWS, HEADS, CHANNELS, generator=generator).to(dtype)
    key, value = (torch.randn(CONTEXT, ROWS, GROUPS, CHANNELS, generator=generator).to(dtype) for _ in range(2))
    ranges = torch.randint(0, CONTEXT + 1, (ROWS, TOKENS, 2), generator=generator).sort(-1).values
    ranges[0, :2] = 0
    ranges[1, 3] = CONTEXT
    ranges[2, 4] = torch.tensor([0, CONTEXT])
    ranges[2, 5] = torch.tensor([CONTEXT - 1, CONTEXT])
    return query, key, value, ranges


def written_out(query: Tensor, key: Tensor, value: Tensor, ranges: Tensor) -> Tensor:
    """Each token and head by itself, in float64."""
    attended = torch.zeros(TOKENS, ROWS, HEADS, CHANNELS, dtype=torch.float64)
    for row in range(ROWS):
        for token in range(TOKENS):
            start, stop = ranges[row, token].tolist()
            for head in range(HEADS):
                if start < stop:
                    group = head // (HEADS // GROUPS)
                    keys, values = (states[start:stop, row, group].double() for states in (key, value))
                    weights = (keys @ query[token, row, head].double() / CHANNELS**0.5).softmax(0)
                    attended[token, row, head] = weights @ values
    return attended.flatten(2)


# Worst seen: 3.3e-7 in float32, 8e-3 in bfloat16.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_each_token_sees_its_range(dtype: torch.dtype, tolerance: float) -> None:
    query, key, value, ranges = random_inputs(dtype)
    attended = attention()(query, key, value, ranges)
    torch.testing.assert_close(attended.double(), written_out(query, key, value, ranges), rtol=0, atol=tolerance)
    empty = ranges[..., 0] >= ranges[..., 1]
    assert empty.sum() >= 3
    assert attended.transpose(0, 1)[empty].count_nonzero() == 0


def test_gradients_are_those_of_the_sums_and_none_for_what_is_not_seen() -> None:
    query, key, value, ranges = random_inputs(torch.float32)
    upstream = torch.randn(TOKENS, ROWS, HEADS * CHANNELS, generator=torch.Generator().manual_seed(1))
    gradients = []
    for function in (attention(), written_out):
        leaves = [states.clone().requires_grad_() for states in (query, key, value)]
        (function(*leaves, ranges) * upstream).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for given, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)  # worst seen: 1.2e-6
    nobody = torch.zeros_like(ranges)
    leaves = [states.clone().requires_grad_() for states in (query, key, value)]
    (attention()(*leaves, nobody) * upstream).sum().backward()
    assert all(leaf.grad.count_nonzero() == 0 for leaf in leaves)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_on_cuda_give_values_and_gradients() -> None:
    inputs = random_inputs(torch.float32)
    upstream = torch.randn(TOKENS, ROWS, HEADS * CHANNELS, generator=torch.Generator().manual_seed(1))
    leaves = [states.cuda().requires_grad_() for states in inputs[:3]]
    attended = attention()(*leaves, inputs[3].cuda())
    (attended * upstream.cuda()).sum().backward()
    expected = [states.clone().requires_grad_() for states in inputs[:3]]
    sums = written_out(*expected, inputs[3])
    (sums * upstream).sum().backward()
    torch.testing.assert_close(attended.cpu().double(), sums, rtol=0, atol=2e-2)  # TF32 products; never run yet
    for leaf, wanted in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad.cpu(), wanted.grad, rtol=0, atol=2e-2)


def test_the_block_mask_of_cuda_says_the_same() -> None:
    query, key, value, ranges = random_inputs(torch.float32)
    attended = flex_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        block_mask=range_block_mask(ranges, CONTEXT),
        enable_gqa=True,
    )
    expected = written_out(query, key, value, ranges)
    attended = attended.permute(2, 0, 1, 3).flatten(2).double()
    torch.testing.assert_close(attended, expected, rtol=0, atol=2e-6)  # worst seen: 3.6e-7


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_give_the_same_for_lengths_that_are_no_multiples() -> None:
    generator = torch.Generator().manual_seed(2)
    for length, context_length in ((300, 400), (170, 700)):  # the second time without compiling anew
        query = torch.randn(2, HEADS, length, CHANNELS, generator=generator)
        key, value = (torch.randn(2, GROUPS, context_length, CHANNELS, generator=generator) for _ in range(2))
        ranges = torch.randint(0, context_length + 1, (2, length, 2), generator=generator).sort(-1).values
        ranges[0, :140] = 0  # a whole block that sees nothing
        empty = ranges[..., 0] >= ranges[..., 1]
        with torch.no_grad():
            mask = range_block_mask(ranges, context_length)
            attended = compiled_flex_attention()(query, key, value, block_mask=mask, enable_gqa=True)
        seen = ~range_mask(ranges, context_length)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
        expected = expected.masked_fill(empty[:, None, :, None], 0.0)
        torch.testing.assert_close(attended, expected, rtol=0, atol=5e-6)  # worst seen: 7.2e-7


@pytest.mark.parametrize("length", [40, 32, 7])
def test_blocks_are_visited_where_any_token_sees(length: int) -> None:
    context_length, size = 50, 8
    generator = torch.Generator().manual_seed(length)
    ranges = torch.randint(0, context_length + 1, (4, length, 2), generator=generator).sort(-1).values
    ranges[0] = 0  # a row that sees nothing
    ranges[1, :, 1] = (ranges[1, :, 0] + 3).clamp(max=context_length)
    mask = range_block_mask(ranges, context_length, size)
    visited = mask.to_dense()[:, 0]
    seen = ~range_mask(ranges, context_length)[:, 0] & (ranges[..., 0] < ranges[..., 1]).unsqueeze(-1)
    for row in range(4):
        for block in range(-(-length // size)):
            tokens = seen[row, block * size : (block + 1) * size].any(0)
            needed = [bool(tokens[start : start + size].any()) for start in range(0, context_length, size)]
            got = visited[row, block].bool().tolist()
            assert all(there for there, wanted in zip(got, needed, strict=True) if wanted)
            if any(needed):
                first, last = needed.index(True), len(needed) - needed[::-1].index(True)
                assert got == [first <= number < last for number in range(len(needed))]
            else:
                assert not any(got)


def test_a_token_that_sees_nothing_is_let_look_somewhere() -> None:
    mask = range_mask(torch.tensor([[[0, 0], [2, 2], [1, 3], [4, 4]]]), 4)
    assert (~mask[0, 0]).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("gate", [0.0, 0.3])
def test_a_gate_adds_its_tanh_of_the_branch(gate: float) -> None:
    residual, branch = torch.randn(2, 5, 2, HEADS * CHANNELS, generator=torch.Generator().manual_seed(2)).unbind(0)
    add = GatedResidual(config(), gate_init=gate)(True, False)
    added = add((branch, None), residual, 0.0)
    torch.testing.assert_close(added, residual + branch * torch.tanh(torch.tensor(gate)))
    assert torch.equal(added, residual) == (gate == 0.0)
