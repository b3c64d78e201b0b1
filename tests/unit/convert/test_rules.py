"""Layouts and rows of weight maps, on tensors small enough to read."""

import pytest
import torch

from megavlm.convert.rules import GatedMLP, GroupedQKV, Layout, LeadingOnes, PackedQKV, Rule, Same, under


def rows(*values: int) -> torch.Tensor:
    return torch.tensor(values).unsqueeze(1).float()


def test_grouped_qkv_interleaves_group_by_group() -> None:
    # 4 query heads in 2 groups, 1 channel a head
    merged = GroupedQKV(4, 2).merge([rows(1, 2, 3, 4), rows(10, 20), rows(100, 200)])
    assert merged.flatten().tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


def test_packed_qkv_interleaves_head_by_head() -> None:
    # 2 heads of 2 channels: all queries, all keys, all values
    merged = PackedQKV(2).merge([rows(1, 2, 3, 4, 10, 20, 30, 40, 100, 200, 300, 400)])
    assert merged.flatten().tolist() == [1, 2, 10, 20, 100, 200, 3, 4, 30, 40, 300, 400]


def test_gated_mlp_has_the_gate_first() -> None:
    assert GatedMLP().merge([rows(1, 2), rows(3, 4)]).flatten().tolist() == [1, 2, 3, 4]


LAYOUTS: list[tuple[Layout, list[tuple[int, ...]]]] = [
    (Same(), [(3, 4)]),
    (LeadingOnes(1), [(1, 17, 8)]),
    (LeadingOnes(2), [(1, 1, 8)]),
    (GroupedQKV(6, 2), [(24, 5), (8, 5), (8, 5)]),
    (GroupedQKV(6, 2), [(24,), (8,), (8,)]),
    (GroupedQKV(5, 5), [(20, 7), (20, 7), (20, 7)]),
    (PackedQKV(5), [(60, 7)]),
    (PackedQKV(5), [(60,)]),
    (GatedMLP(), [(9, 4), (9, 4)]),
]


@pytest.mark.parametrize(("layout", "shapes"), LAYOUTS, ids=lambda value: str(value).replace(" ", ""))
def test_there_and_back_is_bit_equal(layout: Layout, shapes: list[tuple[int, ...]]) -> None:
    theirs = [torch.randn(shape).to(torch.bfloat16) for shape in shapes]
    back = layout.split(layout.merge(theirs))
    assert len(back) == len(theirs)
    for found, expected in zip(back, theirs, strict=True):
        assert found.dtype == torch.bfloat16
        assert found.is_contiguous()
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("layout", "shapes", "message"),
    [
        (GroupedQKV(4, 2), [(8, 3), (8, 3), (8, 3)], r"have \[8, 8, 8\] rows, which are not 4 heads in 2 groups"),
        (GroupedQKV(4, 2), [(3, 3), (1, 3), (1, 3)], r"have \[3, 1, 1\] rows, which are not 4 heads in 2 groups"),
        (PackedQKV(4), [(15, 3)], r"has 15 rows, which are not queries, keys and values of 4 heads"),
        (LeadingOnes(2), [(1, 3, 4)], r"has shape \(1, 3, 4\), which does not start with 2 dimensions of size 1"),
    ],
)
def test_shapes_that_do_not_fit_are_named(layout: Layout, shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.merge([torch.zeros(shape) for shape in shapes])


def test_a_row_maps_names_both_ways() -> None:
    rule = Rule("layers.{layer}.qkv.{leaf}", ("h.{layer}.q.{leaf}", "h.{layer}.k.{leaf}"))
    assert rule.their_names("layers.12.qkv.bias") == ("h.12.q.bias", "h.12.k.bias")
    assert rule.our_key("h.3.k.weight") == "layers.3.qkv.weight"
    for other in ("layers.x.qkv.bias", "layers.1.qkv.scale", "layers.1.qkv.bias.more", "a.layers.1.qkv.bias"):
        assert rule.their_names(other) is None
    assert rule.our_key("hx3.k.weight") is None  # a dot is a dot


def test_a_prefix_goes_before_every_name() -> None:
    (rule,) = under((Rule("a.{leaf}", ("b.{leaf}", "c.{leaf}")),), ours="vision.", theirs="tower.")
    assert rule.their_names("vision.a.weight") == ("tower.b.weight", "tower.c.weight")
