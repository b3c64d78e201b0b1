"""Blends: shares, epochs, and an order that depends on the seed and the position alone."""

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from small_data import chat

from megavlm.data import Blend, BlendConfig
from megavlm.data.order import LONGEST_BLOCK, block_counts


def source(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "dataset": {"kind": "jsonl", "path": f"{name}.jsonl"}, **settings}


def blend(*sources: dict[str, Any], **settings: Any) -> BlendConfig:
    return BlendConfig.model_validate({"sources": sources, **settings})


MM1 = blend(source("caption", weight=45), source("interleaved", weight=45), source("text", weight=10))
MM1_5 = blend(
    source("general", group="single"),
    source("science", group="single"),
    source("several", group="multi"),
    source("books", group="text"),
    groups={"single": 0.8, "multi": 0.1, "text": 0.1},
)


def drawn(config: BlendConfig, sizes: list[int], count: int, seed: int = 1, start: int = 0) -> list[tuple[int, int]]:
    """``(source, row of the source)`` at each position."""
    order = config.order(sizes, seed, shuffle=True)
    found = []
    for position in range(start, start + count):
        row = order.row(position)
        number = next(n for n in range(len(sizes)) if row < sum(sizes[: n + 1]))
        found.append((number, row - sum(sizes[:number])))
    return found


def test_one_level_of_weights_is_met_exactly_in_every_block() -> None:
    """45:45:10 fits 20 samples: 9, 9 and 2, wherever 20 begin that are a block."""
    found = [number for number, _ in drawn(MM1, [100, 7, 1000], 2000)]
    for start in range(0, 2000, 20):
        assert Counter(found[start : start + 20]) == {0: 9, 1: 9, 2: 2}
    # and at no time further from it than one block
    for stop in range(1, 2000):
        assert abs(found[:stop].count(2) - 0.1 * stop) <= 2


def test_two_levels_of_weights_share_a_group_by_size() -> None:
    sizes = [300, 100, 50, 5]
    assert MM1_5.shares(sizes) == [Fraction(6, 10), Fraction(2, 10), Fraction(1, 10), Fraction(1, 10)]
    counts = Counter(number for number, _ in drawn(MM1_5, sizes, 5000))
    assert counts == {0: 3000, 1: 1000, 2: 500, 3: 500}


def test_without_weights_shares_follow_sizes() -> None:
    assert blend(source("a"), source("b")).shares([30, 10]) == [Fraction(3, 4), Fraction(1, 4)]
    weighed = blend(source("a", weight=1, group="g"), source("b", weight=3, group="g"), groups={"g": 5})
    assert weighed.shares([30, 10]) == [Fraction(1, 4), Fraction(3, 4)]


def test_each_source_uses_all_its_rows_before_any_again() -> None:
    found = drawn(MM1, [13, 7, 5], 1000)
    for number, size in enumerate([13, 7, 5]):
        rows = [row for of, row in found if of == number]
        for start in range(0, len(rows) - size, size):
            assert sorted(rows[start : start + size]) == list(range(size))
        assert rows[:size] != rows[size : 2 * size]  # another order in the next epoch


def test_the_order_of_sources_is_mixed_and_follows_the_seed() -> None:
    first, other = drawn(MM1, [9, 9, 9], 100), drawn(MM1, [9, 9, 9], 100, seed=2)
    assert first != other
    blocks = {tuple(number for number, _ in first[start : start + 20]) for start in range(0, 100, 20)}
    assert len(blocks) == 5


@pytest.mark.parametrize("config", [MM1, MM1_5, blend(source("a", epochs=0.4), source("b", epochs=3), by="epochs")])
def test_any_position_can_be_asked_first(config: BlendConfig) -> None:
    sizes = [23, 11, 5, 8][: len(config.sources)]
    whole = drawn(config, sizes, 300)
    for start in (299, 150, 7, 0, 40):
        assert drawn(config, sizes, 300 - start, start=start) == whole[start:]


def test_epochs_use_each_source_so_often() -> None:
    config = blend(source("half", epochs=0.5), source("once"), source("twice", epochs=2), by="epochs")
    sizes = [10, 6, 3]
    assert config.shares(sizes) == [Fraction(5, 17), Fraction(6, 17), Fraction(6, 17)]
    first, second = drawn(config, sizes, 17), drawn(config, sizes, 17, start=17)
    for one_pass in (first, second):
        assert Counter(number for number, _ in one_pass) == {0: 5, 1: 6, 2: 6}
        assert Counter(row for number, row in one_pass if number == 2) == {0: 2, 1: 2, 2: 2}
    # the half that the first pass left out comes in the second
    assert sorted(row for number, row in first + second if number == 0) == list(range(10))
    assert [number for number, _ in first] != sorted(number for number, _ in first)


def test_shares_that_no_short_block_meets_are_off_by_less_than_one_part() -> None:
    shares = [Fraction(size, 1_000_003) for size in (700_001, 300_000, 2)]
    counts = block_counts(shares)
    assert sum(counts) == LONGEST_BLOCK
    assert min(counts) == 1  # two of a million: no source is left out
    assert all(abs(count - share * LONGEST_BLOCK) < 1 for count, share in zip(counts, shares, strict=True))


def test_sampling_is_as_even_as_drawing_within_its_statistical_error() -> None:
    """Windows that begin anywhere: the share of the text is within three deviations of drawing at random."""
    found = [number for number, _ in drawn(MM1, [50, 50, 50], 3000)]
    for start in range(3, 2000, 97):
        count = found[start : start + 1000].count(2)
        assert abs(count - 100) <= 3 * math.sqrt(1000 * 0.1 * 0.9)


@pytest.fixture
def opened(write_rows: Callable[..., Path]) -> Blend:
    for name, count in (("a", 3), ("b", 2)):
        write_rows([chat("Q", f"{name}{number}") for number in range(count)] + ["broken"], f"{name}.jsonl")
    folder = write_rows([]).parent
    sources = [
        {"dataset": {"kind": "jsonl", "path": folder / f"{name}.jsonl", "bad_rows": "skip"}} for name in ("a", "b")
    ]
    return BlendConfig.model_validate({"sources": sources}).build()


def test_an_opened_blend_is_all_rows_by_number(opened: Blend) -> None:
    assert len(opened) == 5
    answers = [opened[index][1].messages[-1].text for index in range(5)]
    assert answers == ["a0", "a1", "a2", "b0", "b1"]
    assert [opened.source_of(index) for index in range(5)] == [0, 0, 0, 1, 1]
    assert opened.shares() == {"a.jsonl": 0.6, "b.jsonl": 0.4}
    assert opened.num_bad_rows == 2
    assert [row.split(":")[-1] for row in opened.bad_rows]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            opened[index]


@pytest.mark.parametrize(
    ("sources", "settings", "match"),
    [
        ([], {}, "at least 1 item"),
        ([source("a"), source("a")], {}, r"sources: 1 name\(s\) stand twice: a"),
        ([source("a", weight=0)], {}, "greater than 0"),
        ([source("a", weight=1), source("b")], {}, "sources: 1 of 2 have a weight"),
        ([source("a", group="g")], {}, "groups: the blend weighs none, and its sources have g"),
        ([source("a")], {"groups": {"g": 1}}, "groups: the blend weighs g, and its sources have None"),
        ([source("a", group="g"), source("b")], {"groups": {"g": 1}}, "its sources have None, g"),
        (
            [source("a", group="g", weight=1), source("b", group="g")],
            {"groups": {"g": 1}},
            "sources of group g: 1 of 2 have a weight",
        ),
        ([source("a", weight=1)], {"by": "epochs"}, "by=epochs: has no weights and no groups"),
        ([source("a", epochs=2)], {}, "by=sampling: epochs have no meaning here"),
        ([{"dataset": {"kind": "blend", "sources": []}}], {}, "does not match any of the expected tags"),
    ],
)
def test_what_does_not_fit_is_refused(sources: list[Any], settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        blend(*sources, **settings)
