"""Token ids, masks, spans and visible tiles of small chats, written out by hand in the byte tokenizer."""

from typing import Literal

import pytest
import torch
from small_data import IMAGE, byte_ids

from megavlm.data import Conversation, ImageRef, Message, Tokenizer
from megavlm.data.chat_template import CHAT_TEMPLATES, EOS, Segment, Special, render
from megavlm.data.encoding import ImageSlot, ImageWrapper, TokenRun, encode_segments
from megavlm.data.expansion import Expansion, ImageTokens, TileTokens, count_tokens, expand

END, START = [3], [2]
PICTURE = ImageRef("a.png")


def chatml(*messages: Message) -> list[Segment]:
    return render(CHAT_TEMPLATES["chatml"], Conversation(messages), None)


def tagged(*tags: str, tokens_per_tile: int = 2) -> ImageTokens:
    return ImageTokens(tuple(TileTokens(tuple(byte_ids(tag)), tokens_per_tile) for tag in tags))


def trained_ids(expansion: Expansion) -> list[int]:
    return expansion.labels[expansion.loss_mask.bool()].tolist()


def ranges(text_range: tuple[int, int], *ids: list[int]) -> list[tuple[int, int]]:
    return [text_range] * sum(len(part) for part in ids)


def test_one_image_of_two_tiles_and_a_thumbnail(byte_tokenizer: Tokenizer) -> None:
    segments = chatml(Message("user", (PICTURE, "\nWhat?")), Message("assistant", ("Cat.",)))
    runs = encode_segments(segments, byte_tokenizer, "nvlm")
    image = tagged("<tile_1>", "<tile_2>", "<tile_global_thumbnail>")
    expansion = expand(runs, [image], IMAGE)

    before = START + byte_ids("user\n<Image>")
    tag_1, tag_2, tag_all = byte_ids("<tile_1>"), byte_ids("<tile_2>"), byte_ids("<tile_global_thumbnail>")
    pair = [IMAGE, IMAGE]
    after = byte_ids("</Image>\nWhat?") + END + byte_ids("\n") + START + byte_ids("assistant\n")
    answer = byte_ids("Cat.") + END + byte_ids("\n")
    expected = before + tag_1 + pair + tag_2 + pair + tag_all + pair + after + answer
    assert expansion.tokens.tolist() == expected
    assert (expansion.tokens.dtype, expansion.labels.dtype) == (torch.int64, torch.int64)

    length = len(expected)
    first = length - len(answer) - 1  # the position that predicts the answer's first token
    assert expansion.loss_mask.tolist() == [0.0] * first + [1.0] * len(answer) + [0.0]
    assert expansion.labels.tolist() == [0] * first + answer + [0]

    # 13 tokens before, tags of 8, 8 and 23 tokens, each with 2 image tokens behind it.
    assert len(before) == 13
    assert expansion.tile_spans.tolist() == [[21, 23], [31, 33], [56, 58]]
    assert expansion.tokens_per_image == (8 + 2 + 8 + 2 + 23 + 2,)
    assert expansion.visible_tiles.tolist() == [
        list(pair_)
        for pair_ in ranges((0, 0), before)
        + ranges((0, 1), tag_1, pair)
        + ranges((1, 2), tag_2, pair)
        + ranges((2, 3), tag_all, pair)
        + ranges((0, 3), after, answer)
    ]
    assert count_tokens(runs, [image]) == length


def test_two_images_in_two_turns(byte_tokenizer: Tokenizer) -> None:
    segments = chatml(
        Message("user", ("A", PICTURE)),
        Message("assistant", ("B",)),
        Message("user", (PICTURE, "C")),
        Message("assistant", ("D",)),
    )
    runs = encode_segments(segments, byte_tokenizer, "none")
    expansion = expand(runs, [tagged("x", "yy"), tagged("")], IMAGE)
    newline = byte_ids("\n")
    first = START + byte_ids("user\nA")
    image_1 = [byte_ids("x") + [IMAGE] * 2, byte_ids("yy") + [IMAGE] * 2]
    turn_1 = (
        END + newline + START + byte_ids("assistant\n") + byte_ids("B") + END + newline + START + byte_ids("user\n")
    )
    image_2 = [IMAGE] * 2
    turn_2 = byte_ids("C") + END + newline + START + byte_ids("assistant\n") + byte_ids("D") + END + newline
    assert expansion.tokens.tolist() == first + image_1[0] + image_1[1] + turn_1 + image_2 + turn_2
    assert trained_ids(expansion) == byte_ids("B") + END + newline + byte_ids("D") + END + newline
    assert [tuple(pair) for pair in expansion.visible_tiles.tolist()] == (
        ranges((0, 0), first)
        + ranges((0, 1), image_1[0])
        + ranges((1, 2), image_1[1])
        + ranges((0, 2), turn_1)
        + ranges((2, 3), image_2)
        + ranges((0, 3), turn_2)
    )
    assert expansion.tokens_per_image == (3 + 4, 2)
    starts = [len(first) + 1, len(first) + 3 + 2, len(first) + 3 + 4 + len(turn_1)]
    assert expansion.tile_spans.tolist() == [[start, start + 2] for start in starts]


def test_text_alone(byte_tokenizer: Tokenizer) -> None:
    runs = encode_segments(chatml(Message("user", ("Hi",)), Message("assistant", ("Yo",))), byte_tokenizer, "nvlm")
    expansion = expand(runs, [], IMAGE)
    assert expansion.tokens.tolist() == (
        START + byte_ids("user\nHi") + END + byte_ids("\n") + START + byte_ids("assistant\nYo") + END + byte_ids("\n")
    )
    assert trained_ids(expansion) == byte_ids("Yo") + END + byte_ids("\n")
    assert expansion.tile_spans.shape == (0, 2)
    assert expansion.visible_tiles.count_nonzero() == 0
    assert expansion.tokens_per_image == ()


def test_the_text_before_an_image_in_an_answer_does_not_predict_it(byte_tokenizer: Tokenizer) -> None:
    segments = [Segment("ab", True), Segment(PICTURE, False), Segment("cd", True), Segment(EOS, True)]
    expansion = expand(encode_segments(segments, byte_tokenizer, "internvl"), [tagged("t", tokens_per_tile=1)], IMAGE)
    expected = [*byte_ids("ab<img>t"), IMAGE, *byte_ids("</img>cd"), 0]
    assert expansion.tokens.tolist() == expected
    # "a" predicts "b"; "b" would predict the wrapper and does not; "</img>"'s last byte predicts "c".
    assert trained_ids(expansion) == byte_ids("b") + byte_ids("cd") + [0]
    assert expansion.loss_mask[:2].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("wrapper", "text"), [("nvlm", "<Image></Image>"), ("internvl", "<img></img>"), ("none", "")])
def test_wrappers(byte_tokenizer: Tokenizer, wrapper: ImageWrapper, text: str) -> None:
    runs = encode_segments([Segment(PICTURE, False)], byte_tokenizer, wrapper)
    assert [token for run in runs if isinstance(run, TokenRun) for token in run.ids] == byte_ids(text)
    assert sum(isinstance(run, ImageSlot) for run in runs) == 1


class RecordingTokenizer:
    """Remembers what it was asked to encode."""

    eos_id, bos_id = 0, 1

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []

    def encode(self, text: str, *, starts_text: bool = False) -> list[int]:
        self.calls.append((text, starts_text))
        return [9]

    def special_id(self, text: str) -> int | None:
        return 5 if text.startswith("<|") else None


def test_neighbouring_texts_are_encoded_as_one() -> None:
    """As Megatron-LM and transformers do, whose tokenizers see the text between special symbols whole."""
    tokenizer = RecordingTokenizer()
    encode_segments(chatml(Message("user", (PICTURE, "\nWhat?")), Message("assistant", ("A",))), tokenizer, "nvlm")
    texts = ["user\n<Image>", "</Image>\nWhat?", "\n", "assistant\n", "A", "\n"]
    assert tokenizer.calls == [(text, False) for text in texts]


@pytest.mark.parametrize("name", ["vicuna", "llama2", "plain"])
def test_only_the_very_first_text_starts_the_text(name: str) -> None:
    tokenizer = RecordingTokenizer()
    messages = (Message("user", ("Q",)), Message("assistant", ("A",)))
    encode_segments(render(CHAT_TEMPLATES[name], Conversation(messages), None), tokenizer, "nvlm")
    assert [starts for _, starts in tokenizer.calls] == [True] + [False] * (len(tokenizer.calls) - 1)


def test_a_text_behind_an_image_does_not_start_the_text() -> None:
    tokenizer = RecordingTokenizer()
    encode_segments([Segment(PICTURE, False), Segment("a", False)], tokenizer, "none")
    assert tokenizer.calls == [("a", False)]


def test_a_missing_special_token_is_named(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"data.chat_template: needs the special token '<|nope|>'".replace("|", r"\|")):
        encode_segments([Segment(Special("<|nope|>"), False)], byte_tokenizer, "nvlm")


def test_the_number_of_images_must_be_right(byte_tokenizer: Tokenizer) -> None:
    runs = encode_segments([Segment(PICTURE, False)], byte_tokenizer, "nvlm")
    with pytest.raises(ValueError, match=r"images=2: the rendered conversation has 1 image slot"):
        expand(runs, [tagged("a"), tagged("b")], IMAGE)


def in_context(tag: str, tokens_per_tile: int = 4) -> TileTokens:
    """A regular tile of NVLM-H: nothing in the text, its tag before its features in the context."""
    tag_ids = tuple(byte_ids(tag))
    return TileTokens((), 0, tokens_per_tile + len(tag_ids), tag_ids)


LETTERS = {letter: byte_ids(letter)[0] for letter in "abcdpqtxy"}
A, B, C, D, P, Q, T, X, Y = LETTERS.values()


def letters_around(*images: ImageTokens) -> list[TokenRun | ImageSlot]:
    """Runs "ab", image, "c", image, "d" ... of trained text."""
    runs: list[TokenRun | ImageSlot] = [TokenRun((A, B), True)]
    for letter, _ in zip((C, D), images, strict=False):
        runs += [ImageSlot(), TokenRun((letter,), True)]
    return runs


@pytest.mark.parametrize(("text_sees", "behind_second"), [("all_images", [0, 3]), ("last_image", [2, 3])])
def test_tiles_that_cross_attention_reads(
    text_sees: Literal["all_images", "last_image"], behind_second: list[int]
) -> None:
    """NVLM-X: two tiles with tags, then a tile without, which leaves nothing in the text."""
    first = ImageTokens((TileTokens((X,), 0, 4), TileTokens((Y, Y), 0, 4)))
    images = [first, ImageTokens((TileTokens((), 0, 4),))]
    runs = letters_around(*images)
    expansion = expand(runs, images, IMAGE, text_sees)
    assert expansion.tokens.tolist() == [A, B, X, Y, Y, C, D]
    assert expansion.visible_tiles.tolist() == [[0, 0], [0, 0], [0, 1], [1, 2], [1, 2], [0, 2], behind_second]
    # "b" does not predict the tag; the tag's last token predicts "c", and "c" the text behind an image without tokens.
    assert expansion.loss_mask.tolist() == [1, 0, 0, 0, 1, 1, 0]
    assert expansion.labels.tolist() == [B, 0, 0, 0, C, D, 0]
    assert expansion.tile_context.tolist() == [4, 4, 4]
    assert expansion.tile_tags.tolist() == [[], [], []]
    assert expansion.tile_spans.tolist() == [[3, 3], [5, 5], [6, 6]]
    assert expansion.tokens_per_image == (3, 0)
    assert count_tokens(runs, images) == 7


def test_text_that_sees_the_image_behind_it() -> None:
    """Flamingo's other choice: tags see their own tile all the same, and the last text sees nothing."""
    first = ImageTokens((TileTokens((X,), 0, 4), TileTokens((Y,), 0, 4)))
    images = [first, ImageTokens((TileTokens((), 0, 4),))]
    expansion = expand(letters_around(*images), images, IMAGE, "next_image")
    assert expansion.tokens.tolist() == [A, B, X, Y, C, D]
    assert expansion.visible_tiles.tolist() == [[0, 2], [0, 2], [0, 1], [1, 2], [2, 3], [0, 0]]
    assert expand([ImageSlot()], images[1:], IMAGE, "next_image").visible_tiles.tolist() == []
    assert expand(letters_around(), [], IMAGE, "next_image").visible_tiles.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(("text_sees", "behind_second"), [("all_images", [0, 4]), ("last_image", [3, 4])])
def test_a_thumbnail_in_the_text_and_tiles_in_the_context(
    text_sees: Literal["all_images", "last_image"], behind_second: list[int]
) -> None:
    """NVLM-H: two regular tiles with tags of one and two tokens and a thumbnail, then an image of a single tile."""
    whole = TileTokens((T,), 2)
    images = [ImageTokens((in_context("p"), in_context("qq"), whole)), ImageTokens((whole,))]
    assert [image.uses_context for image in images] == [True, False]
    runs = letters_around(*images)
    expansion = expand(runs, images, IMAGE, text_sees)
    assert expansion.tokens.tolist() == [A, B, T, IMAGE, IMAGE, C, T, IMAGE, IMAGE, D]
    assert expansion.visible_tiles.tolist() == [
        *([[0, 0]] * 2),
        [2, 3],  # the thumbnail's tag
        *([[0, 3]] * 2),  # its image tokens see the tiles of their image
        [0, 3],
        *([[3, 4]] * 3),  # the single tile, which is not in the context
        behind_second,
    ]
    assert expansion.loss_mask.tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert expansion.tile_context.tolist() == [4 + 1, 4 + 2, 0, 0]
    assert expansion.tile_tags.tolist() == [[P, -1], [Q, Q], [-1, -1], [-1, -1]]
    assert expansion.tile_spans.tolist() == [[2, 2], [2, 2], [3, 5], [7, 9]]
    assert expansion.tokens_per_image == (3, 3)
    assert count_tokens(runs, images) == 10


def test_the_thumbnail_of_a_later_image_sees_the_tiles_of_its_own_only() -> None:
    image = ImageTokens((in_context("p"), TileTokens((T,), 1)))
    expansion = expand(letters_around(image, image), [image, image], IMAGE)
    assert expansion.tokens.tolist() == [A, B, T, IMAGE, C, T, IMAGE, D]
    assert expansion.visible_tiles.tolist() == [
        *([[0, 0]] * 2),
        *([1, 2], [0, 2]),
        [0, 2],
        *([3, 4], [2, 4]),
        [0, 4],
    ]
    assert expansion.tile_tags.tolist() == [[P], [-1], [P], [-1]]


def test_text_alone_has_no_context() -> None:
    expansion = expand(letters_around(), [], IMAGE)
    assert (expansion.tile_context.shape, expansion.tile_tags.shape) == ((0,), (0, 0))
    assert (expansion.tile_context.dtype, expansion.tile_tags.dtype) == (torch.int64, torch.int64)
    assert expansion.visible_tiles.tolist() == [[0, 0], [0, 0]]
