"""CIDEr-D, worked by hand, and the words it counts."""

import math

import pytest

from megavlm.evaluation.metrics import CIDEr, Item
from megavlm.evaluation.metrics.caption_tokens import split_caption


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man, riding a horse.", "a man riding a horse"),
        ("The dog's tail isn't long", "the dog 's tail is n't long"),
        ("can't \u2019tis they\u2019re", "ca n't tis they 're"),
        ("the dogs' bowl", "the dogs bowl"),
        ("a t-shirt -- or two", "a t-shirt or two"),
        ("1,000 cars at 10:30, 3.5 km", "1,000 cars at 10:30 3.5 km"),
        ("the U.S. flag.", "the u.s. flag"),
        ('a sign: "stop" (red) \u2026', "a sign stop red"),
        ("$5 & 10%", "$ 5 & 10 %"),
        ("Caf\u00e9 \u6771\u4eac", "caf\u00e9 \u6771\u4eac"),
        ("...!?", ""),
    ],
)
def test_words(caption: str, expected: str) -> None:
    assert split_caption(caption) == expected.split()


def value(items: list[Item], **options: float) -> list[float]:
    return list(CIDEr(**options).score(items).per_item)


def test_rare_words_count_more() -> None:
    # Four images; "dog" is in the references of one, "old" in those of two: weights log(4) = 2u and log(2) = u. "cat"
    # and "new" are in none, which weighs as much as one. "old cat" against "old dog": u u / (|u, 2u| |u, 2u|) = 1/5.
    # "new dog" against it: 2u 2u / (|2u, 2u| |u, 2u|) = 4 / sqrt(8 * 5).
    others = [Item("2", "x", ["old car"]), Item("3", "x", ["y"]), Item("4", "x", ["z"])]
    # measured differences in this file: below 2e-15
    assert value([Item("1", "old cat", ["old dog"]), *others], max_words=1)[0] == pytest.approx(10 / 5, abs=1e-12)
    expected = 10 * 4 / math.sqrt(40)
    assert value([Item("1", "new dog", ["old dog"]), *others], max_words=1)[0] == pytest.approx(expected, abs=1e-12)


def test_mean_over_sizes_and_references() -> None:
    # All words in one image each. Against "b c": one of two words, no pair. Against "a b": both words and the pair.
    items = [Item("1", "a b", ["b c", "a b"]), Item("2", "x", ["y"])]
    assert value(items)[0] == pytest.approx(10 * (1 / 2 + 0 + 1 + 1) / 4 / 2, abs=1e-12)


def test_repeated_words_are_clipped_and_length_is_penalised() -> None:
    # "a a a" has weight 3u, clipped to the reference's u: u * u / (3u * u); two words longer.
    items = [Item("1", "a a a", ["a"]), Item("2", "x", ["y"])]
    assert value(items, max_words=1)[0] == pytest.approx(10 / 3 * math.exp(-4 / 72), abs=1e-12)
    assert value(items, max_words=1, sigma=1.0)[0] == pytest.approx(10 / 3 * math.exp(-4 / 2), abs=1e-12)


def test_words_of_every_image_say_nothing() -> None:
    items = [Item("1", "a b", ["a b"]), Item("2", "a", ["a c"])]
    assert value(items, max_words=1) == pytest.approx([10.0, 0.0], abs=1e-12)


def test_one_image_counts_a_word_once_however_many_references_have_it() -> None:
    # "a" is in one of two images, not in two of three captions: its weight is log(2), not 0.
    items = [Item("1", "a", ["a", "a"]), Item("2", "x", ["y"])]
    assert value(items, max_words=1)[0] == pytest.approx(10.0, abs=1e-12)


def test_a_caption_of_punctuation_alone() -> None:
    assert value([Item("1", "...", ["a dog"]), Item("2", "x", ["?"])]) == [0.0, 0.0]


def test_one_image_is_no_corpus() -> None:
    with pytest.raises(ValueError, match=r"items=\['only'\]: CIDEr .* at least 2 images, here are 1"):
        CIDEr().score([Item("only", "a dog", ["a dog"])])
