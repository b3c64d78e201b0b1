"""Captions, questions, transcriptions, documents, regions, examples, and what each of them trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import IMAGE, byte_ids, chat

from megavlm.batch import TileRoute
from megavlm.data import Conversation, ImageRef, SampleError, SampleProcessor, few_shot, parse_conversation
from megavlm.data.encoding import TokenRun
from megavlm.data.expansion import expand

ROOT = Path("/pictures")
PICTURE = ImageRef("/pictures/a.png")
OTHER = ImageRef("/pictures/b.png")


def parse(row: Any, **settings: Any) -> Conversation:
    return parse_conversation(row, "rows.jsonl:17", ROOT, **settings)


def parts(row: Any, **settings: Any) -> list[tuple[Any, ...]]:
    return [message.parts for message in parse(row, **settings).messages]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"image": "a.png", "caption": "A cat."}, [(PICTURE,), ("A cat.",)]),
        ({"image": "a.png", "caption": "A <image> tag."}, [(PICTURE,), ("A <image> tag.",)]),
        ({"image": "a.png", "caption": "A cat.", "prompt": "Look:"}, [(PICTURE, "\nLook:"), ("A cat.",)]),
        ({"image": "a.png", "transcription": "STOP"}, [(PICTURE,), ("STOP",)]),
        ({"image": "a.png", "question": "Q?", "answer": "A"}, [(PICTURE, "\nQ?"), ("A",)]),
        ({"question": "Q?", "answer": "A"}, [("Q?",), ("A",)]),
        (
            {"images": ["a.png", "b.png"], "question": "Is <image> as <image>?", "answer": "A"},
            [("Is ", PICTURE, " as ", OTHER, "?"), ("A",)],
        ),
        ({"text": "Only words."}, [("Only words.",)]),
        ({"text": "One <image> two", "image": "a.png"}, [("One ", PICTURE, " two")]),
        (
            {"texts": ["One", None, "two", None], "images": [None, "a.png", None, "b.png"]},
            [("One", PICTURE, "two", OTHER)],
        ),
    ],
)
def test_rows_that_are_no_conversation(row: dict[str, Any], expected: list[tuple[Any, ...]]) -> None:
    assert parts(row) == expected
    assert parse(row).is_document == ("text" in row or "texts" in row)


def test_turns_win_over_other_keys() -> None:
    assert parts(chat("Q", "A") | {"caption": "C", "text": "T"}) == [("Q",), ("A",)]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"caption": "A cat."}, "the row has a caption, but no image"),
        ({"image": "a.png", "caption": 5}, "caption is no text"),
        ({"image": "a.png", "caption": "C", "transcription": "T"}, "caption and transcription, which say different"),
        ({"image": "a.png", "question": "Q?"}, "answer is missing"),
        ({"image": "a.png", "caption": "  "}, r"message 2 \(assistant\) is empty"),
        ({"text": " <image> ", "image": "a.png"}, "the document has no text"),
        ({"text": "T", "image": "a.png"}, r"0 <image> placeholder\(s\) in the texts, but 1 image"),
        ({"text": "a\ud800"}, "text holds the broken character"),
        ({"texts": ["a"], "images": []}, "texts and images are not two lists of equal length"),
        ({"texts": ["a"], "images": ["a.png"]}, r"texts\[0\] and images\[0\] are both given"),
        ({"texts": [None], "images": [None]}, r"texts\[0\] and images\[0\] are neither given"),
        ({"texts": [5], "images": [None]}, r"texts\[0\] is no text"),
        ({"texts": ["a", None], "images": [None, 5]}, r"images is a number \(5\), not a path"),
    ],
)
def test_what_is_wrong_with_them_is_said(row: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=rf"^rows.jsonl:17: .*{match}"):
        parse(row)


# ---- regions ---------------------------------------------------------------------------------------------------------


def region_row(**settings: Any) -> dict[str, Any]:
    return {"image": "a.png", "question": "Where? <box> or <point>", "answer": "At <box>."} | settings


UNIT = {"coordinates": "unit", "boxes": [[0, 0.29, 0.5, 1], [0.1, 0.2, 0.57, 0.9999]], "points": [[1, 0]]}


def test_boxes_and_points_become_text() -> None:
    assert parts(region_row(**UNIT)) == [
        (PICTURE, "\nWhere? [0, 290, 500, 999] or [999, 0]"),
        ("At [100, 200, 570, 999].",),
    ]
    assert parts(region_row(**UNIT), coordinate_style="nvlm") == [
        (PICTURE, "\nWhere? <box>(0,290),(500,1000)</box> or (1000,0)"),
        ("At <box>(100,200),(570,999)</box>.",),
    ]


@pytest.mark.parametrize(
    ("coordinates", "box"),
    [
        ({"coordinates": "pixels", "width": 640, "height": 480}, [64, 48, 639, 479]),
        ({"coordinates": "thousandths"}, [100, 100, 998.4, 997.9]),
        ({"coordinates": "unit"}, [0.1, 0.1, 0.9985, 0.9975]),
    ],
)
def test_units(coordinates: dict[str, Any], box: list[float]) -> None:
    row = {"image": "a.png", "question": "Q", "answer": "<box>", "boxes": [box], **coordinates}
    low = [100, 100]
    expected = [*low, int(639 / 640 * 1000), int(479 / 480 * 1000)]
    assert parts(row)[1] == (str(expected),)


def test_without_regions_the_marks_are_text() -> None:
    assert parts({"image": "a.png", "caption": "<box> <point>"})[1] == ("<box> <point>",)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (UNIT | {"coordinates": None}, "coordinates is None, and must say the unit"),
        (UNIT | {"boxes": UNIT["boxes"][:1]}, r"the texts have more <box> than the row has boxes \(1\)"),
        (UNIT | {"points": [[0, 0], [1, 1]]}, "1 <point> in the texts, but 2 points in the row"),
        (UNIT | {"boxes": [[0, 0, 1], [0, 0, 1, 1]]}, r"boxes\[0\] is not a list of 4 numbers"),
        (UNIT | {"boxes": [[0, 0, 1, 1.5], [0, 0, 1, 1]]}, r"boxes\[0\]=\[0, 0, 1, 1.5\] lies outside the image"),
        (UNIT | {"boxes": [[0, 0, 1, -0.1], [0, 0, 1, 1]]}, "lies outside the image"),
        (UNIT | {"boxes": [[0.5, 0, 0.4, 1], [0, 0, 1, 1]]}, "has its right or bottom before its left or top"),
        (UNIT | {"boxes": [[True, 0, 1, 1], [0, 0, 1, 1]]}, r"boxes\[0\] holds True, not a number"),
        (UNIT | {"boxes": [[float("nan"), 0, 1, 1], [0, 0, 1, 1]]}, r"boxes\[0\] holds nan, not a number"),
        (UNIT | {"boxes": "all"}, "boxes is no list"),
        (UNIT | {"coordinates": "pixels"}, "need the image's width and height, which are None and None"),
        (UNIT | {"coordinates": "pixels", "width": 0, "height": 5}, "width and height, which are 0 and 5"),
        (UNIT | {"coordinates": "pixels", "image": None}, "coordinates in pixels need one image, and the row has 0"),
        (UNIT | {"boxes": [[10**400, 0, 1, 1], [0, 0, 1, 1]]}, "lies outside the image"),
    ],
)
def test_what_is_wrong_with_regions_is_said(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=rf"^rows.jsonl:17: .*{match}"):
        parse(region_row(**settings))


# ---- what is trained -------------------------------------------------------------------------------------------------


def trained(sample: Any) -> list[int]:
    return sample.labels[sample.loss_mask > 0].tolist()


def test_all_text_of_a_document_is_trained(
    make_processor: Callable[..., SampleProcessor], write_image: Callable[..., Path]
) -> None:
    path = str(write_image("a.png", 8, 8))
    row = parse({"text": "One<image>two<image>!", "images": [path, path]})
    sample = make_processor(image_wrapper="none", tile_tags="none")("k", row)
    assert sample.tokens.tolist() == [*byte_ids("One"), IMAGE, IMAGE, *byte_ids("two"), IMAGE, IMAGE, *byte_ids("!"), 0]
    assert trained(sample) == [*byte_ids("netwo!"), 0]  # the first token has none before it; images are not written
    assert sample.num_trained_tokens == 7


def test_a_document_is_asked_up_to_its_last_image(
    make_processor: Callable[..., SampleProcessor], write_image: Callable[..., Path]
) -> None:
    path = str(write_image("a.png", 8, 8))
    prompt = make_processor(image_wrapper="none", tile_tags="none").prompt(
        "k", parse({"text": "One<image>two<image> end", "images": [path, path]})
    )
    assert prompt.sample.tokens.tolist() == [*byte_ids("One"), IMAGE, IMAGE, *byte_ids("two"), IMAGE, IMAGE]
    assert prompt.sample.num_trained_tokens == 0
    assert prompt.reference_answer == " end"


def two_turns(**second: Any) -> dict[str, Any]:
    turns = [("user", "Q"), ("assistant", "Yes."), ("user", "R"), ("assistant", "No, it is not.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[3] |= second
    return {"messages": messages}


@pytest.mark.parametrize(("weighting", "power"), [("token", 0.0), ("sample", -1.0), ("square_root", -0.5)])
def test_weighting_by_the_length_of_a_turn(
    make_processor: Callable[..., SampleProcessor], weighting: str, power: float
) -> None:
    sample = make_processor(loss_weighting=weighting)("k", parse(two_turns()))
    weights = sample.loss_mask[sample.loss_mask > 0]
    # <|im_end|> and the line break are trained with each answer
    first, second = len("Yes.") + 2, len("No, it is not.") + 2
    expected = torch.tensor([first**power] * first + [second**power] * second)
    assert torch.allclose(weights, expected, rtol=1e-6, atol=0)  # float32 of the same powers


def test_a_message_s_weight_multiplies_and_zero_is_not_trained(make_processor: Callable[..., SampleProcessor]) -> None:
    heavy = make_processor(loss_weighting="sample")("k", parse(two_turns(weight=2.5)))
    weights = heavy.loss_mask[heavy.loss_mask > 0]
    assert weights[:6].sum().item() == pytest.approx(1.0)
    assert weights[6:].sum().item() == pytest.approx(2.5)
    silent = make_processor()("k", parse(two_turns(weight=0)))
    assert trained(silent) == [*byte_ids("Yes."), 3, *byte_ids("\n")]


@pytest.mark.parametrize("weight", [-1, "1", True, float("nan"), 10**400, float("inf")])
def test_wrong_weights(weight: object) -> None:
    with pytest.raises(ValueError, match=r"message 4: weight is .*, not a number from 0 to 1000"):
        parse(two_turns(weight=weight))


def test_a_row_whose_answers_all_weigh_nothing_is_refused() -> None:
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}]}
    with pytest.raises(ValueError, match="every message of the assistant has weight 0"):
        parse(row)
    assert parse(row, needs_answer=False)


def test_the_first_token_of_a_turn_counts_only_if_it_is_predicted() -> None:
    """Three trained tokens, of which two have one before them: each weighs a half."""
    expansion = expand([TokenRun((5, 6, 7), True)], [], 99, loss_weighting="sample")
    assert expansion.loss_mask.tolist() == [0.5, 0.5, 0.0]


# ---- examples before a question --------------------------------------------------------------------------------------


def test_examples_are_earlier_turns_that_are_not_trained(make_processor: Callable[..., SampleProcessor]) -> None:
    shots = [parse(chat("1+1?", "2") | {"system": "Old."}), parse(chat("1+2?", "3"))]
    query = parse(chat("2+2?", "4") | {"system": "Count."})
    joined = few_shot(shots, query)
    assert [message.role for message in joined.messages] == ["system"] + ["user", "assistant"] * 3
    assert joined.messages[0].text == "Count."
    processor = make_processor()
    assert trained(processor("k", joined)) == trained(processor("k", query))
    assert processor.prompt("k", joined).reference_answer == "4"


def test_documents_are_joined() -> None:
    shots = [parse({"text": "<image>a", "image": "a.png"})]
    joined = few_shot(shots, parse({"text": "<image>b", "image": "b.png"}))
    assert joined.is_document
    assert joined.messages[0].parts == (PICTURE, "a", "\n\n", OTHER, "b")


def test_examples_that_do_not_fit_are_refused() -> None:
    query = parse(chat("Q", "A"))
    with pytest.raises(ValueError, match="documents and conversations are mixed"):
        few_shot([parse({"text": "T"})], query)
    asked = parse({"messages": [{"role": "user", "content": "Q"}]}, needs_answer=False)
    with pytest.raises(ValueError, match=r"shots\[0\]: ends with the user"):
        few_shot([asked], query)


# ---- too long --------------------------------------------------------------------------------------------------------


@pytest.fixture
def document(write_image: Callable[..., Path]) -> Conversation:
    """Ten letters, an image of three tiles and a thumbnail, three times; each image has at least two tokens."""
    path = str(write_image("wide.png", 24, 8))
    return parse({"text": "abcdefghij<image>" * 3 + "the end", "images": [path] * 3})


def over(make_processor: Callable[..., SampleProcessor], length: int, **settings: Any) -> SampleProcessor:
    return make_processor(image_wrapper="none", tile_tags="none", seq_length=length, **settings)


FULL = 30 + 3 * 8 + len("the end") + 1


@pytest.mark.parametrize(
    ("length", "policy", "num_images", "text", "is_cut"),
    [
        (FULL, "skip", 3, "abcdefghij" * 3 + "the end", False),
        (44, "skip", 3, "abcdefghij" * 3 + "the end", False),  # every image at one tile: 30 + 6 + 8
        (43, "truncate_images", 2, "abcdefghij" * 3 + "the end", False),
        (39, "truncate_images", 0, "abcdefghij" * 3 + "the end", False),
        (43, "truncate_text", 3, "abcdefghij" * 3 + "the end", True),  # the end of text goes
        (36, "truncate_text", 3, "abcdefghij" * 3, True),
        (35, "truncate_text", 2, "abcdefghij" * 3, True),  # the third image does not fit whole
        (33, "truncate_text", 2, "abcdefghij" * 2 + "abcdefghi", True),
        (5, "truncate_text", 0, "abcde", True),
    ],
)
def test_what_is_cut_off(
    make_processor: Callable[..., SampleProcessor],
    document: Conversation,
    length: int,
    policy: str,
    num_images: int,
    text: str,
    is_cut: bool,
) -> None:
    sample = over(make_processor, length, over_length=policy)("k", document)
    assert sample.num_tokens <= length
    assert bytes(token - 4 for token in sample.tokens.tolist() if 4 <= token < IMAGE).decode() == text
    assert len(sample.tiles_per_image) == num_images
    assert sample.num_dropped_images == 3 - num_images
    assert sample.is_cut == is_cut
    assert int(sample.tiles_per_image.sum()) == sample.tiles.shape[0]


def test_images_that_stay_get_their_tiles_back(
    make_processor: Callable[..., SampleProcessor], document: Conversation
) -> None:
    """Without the third image, 44 tokens have room for no more tiles: 38 of text, 4 of two images."""
    sample = over(make_processor, 43, over_length="truncate_images")("k", document)
    assert sample.tiles_per_image.tolist() == [1, 1]
    assert sample.num_tokens == 42
    sample = over(make_processor, 52, over_length="truncate_images", max_tiles_per_sample=2)("k", document)
    assert sample.tiles_per_image.tolist() == [1, 1]
    assert sample.num_dropped_images == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"seq_length": 43}, r"44 tokens \(38 of text, 6 of 3 image\(s\), which cannot take fewer\)"),
        ({"seq_length": 37, "over_length": "truncate_images"}, r"38 tokens \(38 of text, 0 of 0 image"),
        ({"seq_length": 99, "max_tiles_per_sample": 2}, r"3 tiles of 3 image\(s\), which cannot have fewer, are more"),
    ],
)
def test_what_still_does_not_fit_is_skipped(
    make_processor: Callable[..., SampleProcessor], document: Conversation, settings: dict[str, Any], match: str
) -> None:
    processor = make_processor(image_wrapper="none", tile_tags="none", **settings)
    with pytest.raises(SampleError, match=f"k: over_length: {match}"):
        processor("k", document)


def test_a_question_cut_before_its_answer_trains_nothing_and_is_skipped(
    make_processor: Callable[..., SampleProcessor],
) -> None:
    processor = make_processor(seq_length=20, over_length="truncate_text")
    with pytest.raises(SampleError, match=r"cut to data\.seq_length=20 tokens, nothing is left to learn"):
        processor("k", parse(chat("Q" * 50, "A")))
    with pytest.raises(SampleError, match=r"do not fit data\.seq_length=20"):
        processor.prompt("k", parse(chat("Q" * 50, "A")))  # a prompt is never cut


def test_a_budget_of_tiles_takes_them_from_the_image_that_has_most(
    make_processor: Callable[..., SampleProcessor], document: Conversation
) -> None:
    sample = make_processor(max_tiles_per_sample=9)("k", document)
    assert sample.tiles_per_image.tolist() == [3, 3, 3]  # each 3 x 1 and a thumbnail; the next rung is 2 tiles
    assert sample.num_degraded == 3
    sample = make_processor(max_tiles_per_sample=10)("k", document)
    assert sample.tiles_per_image.tolist() == [3, 3, 4]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [4, 4, 4]),
        ({"split_below_images": 3}, [1, 1, 1]),
        ({"split_below_images": 4}, [4, 4, 4]),
        ({"split_last_images": 1}, [1, 1, 4]),
        ({"split_last_images": 0}, [1, 1, 1]),
    ],
)
def test_which_images_are_split(
    make_processor: Callable[..., SampleProcessor],
    document: Conversation,
    settings: dict[str, Any],
    expected: list[int],
) -> None:
    sample = make_processor(**settings)("k", document)
    assert sample.tiles_per_image.tolist() == expected
    assert sample.num_degraded == 0


def test_measuring_agrees_with_making(make_processor: Callable[..., SampleProcessor], document: Conversation) -> None:
    for length in (40, 45, 60, 80, 200):
        processor = over(make_processor, length, over_length="truncate_text")
        sample = processor("k", document)
        assert processor.measure("k", document) == (sample.num_tokens, sample.tiles.shape[0])


# ---- tiles and their indicators --------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_tiles", ["none", "all", "regular"])
def test_separators_stand_between_tiles_and_close_the_image(
    make_processor: Callable[..., SampleProcessor], write_image: Callable[..., Path], context_tiles: str
) -> None:
    """MM1.5, 2 x 2 and the overview last, for each way into the model. One route keeps tags in the text."""
    processor = make_processor(image_wrapper="none", tile_tags="separators", tiling={"kind": "mm1_5", "max_tiles": 4})
    processor.route = TileRoute(context_tiles=context_tiles)  # type: ignore[arg-type]
    path = str(write_image("a.png", 16, 16))
    sample = processor("k", parse({"text": "a<image>b", "image": path}))
    tile = [IMAGE, IMAGE] if context_tiles == "none" else []
    overview = [IMAGE, IMAGE] if context_tiles in ("none", "regular") else []
    marks = [byte_ids(mark) for mark in ("", ",", "<n>", ",")]
    grid = [token for mark in marks for token in (*mark, *tile)]
    assert sample.tokens.tolist() == [*byte_ids("a"), *grid, *byte_ids("<n>"), *overview, *byte_ids(":b"), 0]
    assert trained(sample) == [*byte_ids("b"), 0]
    assert sample.tokens_per_image == (sample.num_tokens - 3,)
    colon = sample.tokens.tolist().index(byte_ids(":")[0])
    assert sample.visible_tiles[colon].tolist() == [0, 5]
    twice = processor("k", parse({"text": "<image><image>b", "images": [path, path]}))
    colons = [number for number, token in enumerate(twice.tokens.tolist()) if token == byte_ids(":")[0]]
    assert [twice.visible_tiles[colon].tolist() for colon in colons] == [[0, 5], [0, 10]]  # as other text


def test_an_overview_that_comes_first_is_the_one_among_the_tokens(
    make_processor: Callable[..., SampleProcessor], write_image: Callable[..., Path]
) -> None:
    processor = make_processor(tile_tags="none", tiling={"kind": "static"})
    processor.route = TileRoute(context_tiles="regular")
    path = write_image("a.png", 16, 16)
    sample = processor("k", parse({"text": "<image>b", "image": str(path)}))
    assert sample.tile_context.tolist() == [0, 2, 2, 2, 2]
    assert sample.tiles.shape[0] == 5
