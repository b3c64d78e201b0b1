"""Rows of every known shape, and every way in which a row can be wrong."""

from pathlib import Path
from typing import Any

import pytest
from small_data import chat

from megavlm.data import Conversation, ImageRef, Message, parse_conversation

ROOT = Path("/pictures")
CAT, DOG = ImageRef("/pictures/cat.png"), ImageRef("/pictures/dog.png")


def parse(row: Any, **settings: Any) -> Conversation:
    return parse_conversation(row, "rows.jsonl:17", ROOT, **settings)


def openai(*parts: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Yes."}]} | keys


TEXT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("row", "user_parts"),
    [
        (chat("Hi"), ("Hi",)),
        (chat("<image>\nHi", images=["cat.png"]), (CAT, "\nHi")),
        (chat("Hi <image>", images=["cat.png"]) | {"image": "cat.png"}, ("Hi ", CAT)),
        (chat("<image><image>Hi", images=["cat.png", "dog.png"]), (CAT, DOG, "Hi")),
        (chat("<image>", images=["cat.png"]), (CAT,)),
        (chat("<image>", images=["/else/cat.png"]), (ImageRef("/else/cat.png"),)),
        (chat("Hi") | {"image": None}, ("Hi",)),
        (chat("Hi") | {"images": []}, ("Hi",)),
        (openai(TEXT), ("What?",)),
        (openai({"type": "image", "image": "cat.png"}, TEXT), (CAT, "What?")),
        (openai({"type": "image_url", "image_url": {"url": "cat.png"}}, TEXT), (CAT, "What?")),
        (
            openai({"type": "image_url", "image_url": "data:image/png;base64,AA"}),
            (ImageRef("data:image/png;base64,AA"),),
        ),
        (openai({"type": "image", "url": "file:///a/cat.png"}, TEXT), (ImageRef("/a/cat.png"), "What?")),
        (openai({"type": "image"}, TEXT, {"type": "image"}, images=["cat.png", "dog.png"]), (CAT, "What?", DOG)),
        # In a list of parts a placeholder's spelling is text.
        (openai({"type": "text", "text": "What is <image>?"}), ("What is <image>?",)),
    ],
)
def test_what_the_user_says(row: dict[str, Any], user_parts: tuple[str | ImageRef, ...]) -> None:
    user, assistant = parse(row).messages
    assert (user.role, user.parts) == ("user", user_parts)
    assert assistant.role == "assistant"


def test_the_same_conversation_in_three_shapes() -> None:
    expected = Conversation(
        (
            Message("system", ("Be brief.",)),
            Message("user", (CAT, "\nWhat?")),
            Message("assistant", ("A cat.",)),
            Message("user", ("And ", DOG, "?")),
            Message("assistant", ("A dog.",)),
        )
    )
    texts = ["Be brief.", "<image>\nWhat?", "A cat.", "And <image>?", "A dog."]
    llava = {
        "image": ["cat.png", "dog.png"],
        "conversations": [
            {"from": speaker, "value": text}
            for speaker, text in zip(["system", "human", "gpt", "human", "gpt"], texts, strict=True)
        ],
    }
    llama_factory = {
        "images": ["cat.png", "dog.png"],
        "system": texts[0],
        "messages": [
            {"role": role, "content": text}
            for role, text in zip(["user", "assistant", "user", "assistant"], texts[1:], strict=True)
        ],
    }
    parts = [
        [{"type": "text", "text": "Be brief."}],
        [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "\nWhat?"}],
        [{"type": "text", "text": "A cat."}],
        [TEXT | {"text": "And "}, {"type": "image_url", "image_url": {"url": "dog.png"}}, TEXT | {"text": "?"}],
        "A dog.",
    ]
    roles = ["system", "user", "assistant", "user", "assistant"]
    openai_row = {"messages": [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]}
    assert parse(llava) == parse(llama_factory) == parse(openai_row) == expected
    assert expected.images == (CAT, DOG)


def turns(*pairs: tuple[Any, Any], **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in pairs]} | keys


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ([], "the row is a list, not an object"),
        ("text", "the row is text, not an object"),
        (None, "the row is null, not an object"),
        (3, r"the row is a number \(3\), not an object"),
        ({}, r"neither conversations nor messages \(keys: none\)"),
        (
            {"texte": "a", "id": 1},
            r"neither conversations nor messages \(keys: id, texte\), nor caption, transcription,",
        ),
        (chat() | {"messages": []}, "both conversations and messages"),
        ({"conversations": "Hi"}, "conversations is text, not a list"),
        ({"conversations": []}, "conversations is empty"),
        ({"messages": ["Hi"]}, "message 1 is text, not an object"),
        (turns(("human", "Hi"), ("robot", "Hi")), "message 2 has the unknown from 'robot'; known are system, human"),
        (turns(("human", "Hi"), (7, "Hi")), "message 2 has the unknown from 7"),
        (turns(("human", "Hi"), ([], "Hi")), r"message 2 has the unknown from \[\]"),
        ({"conversations": [{"from": "human"}]}, r"message 1 has no content \(keys: from\)"),
        ({"messages": [{"content": "Hi"}]}, r"message 1 has no role \(keys: content\)"),
        (turns(("human", 5), ("gpt", "Hi")), r"message 1: value is a number \(5\), not text or a list"),
        (turns(("human", None), ("gpt", "Hi")), "message 1: value is null, not text or a list"),
        (turns(("human", True), ("gpt", "Hi")), "message 1: value is true or false, not text"),
        (turns(("human", "Hi"), ("gpt", "")), r"message 2 \(assistant\) is empty"),
        (turns(("human", "Hi"), ("gpt", " \n")), r"message 2 \(assistant\) is empty"),
        (turns(("human", ""), ("gpt", "Hi")), r"message 1 \(user\) is empty"),
        (turns(("human", "Hi"), ("gpt", "<image>"), image="a.png"), r"message 2 \(assistant\) has images but no text"),
        (turns(("human", "Hi")), "no message is from the assistant"),
        (turns(("system", "Hi")), "no message is from the assistant"),
        (turns(("human", "a"), ("gpt", "b"), ("human", "c")), "the last message is from the user, and nothing answers"),
        (turns(("gpt", "a"), ("human", "b"), ("gpt", "c")), "message 1 is from assistant where user must speak"),
        (turns(("human", "a"), ("human", "b"), ("gpt", "c")), "message 2 is from user where assistant must speak"),
        (turns(("human", "a"), ("system", "b"), ("gpt", "c")), "message 2 is from system where assistant must speak"),
        (turns(("human", "a"), ("gpt", "b"), ("gpt", "c"), system="d"), "message 3 is from assistant where user must"),
        (chat("<image><image>", images=["a.png"]), "2 <image> placeholder.s. in the texts, but 1 image.s. in the row"),
        (chat("Hi", images=["a.png"]), "0 <image> placeholder.s. in the texts, but 1 image.s. in the row"),
        (chat("<image>"), "1 <image> placeholder.s. in the texts, but 0 image.s. in the row"),
        (openai({"type": "image"}, TEXT), "1 <image> placeholder.s. in the texts, but 0 image.s. in the row"),
        (chat("<image>", images=["a.png"]) | {"images": ["b.png"]}, "both image and images"),
        (chat("<image>") | {"image": 5}, r"image is a number \(5\), not a path"),
        (chat("<image>") | {"image": [None]}, "image is null, not a path"),
        (chat("<image>") | {"images": [{"bytes": "x"}]}, "images is an object, not a path"),
        (chat("<image>") | {"image": [""]}, "image is an empty or broken path"),
        (chat("<image>") | {"image": "a\0b"}, "image is an empty or broken path"),
        (
            chat("<image>") | {"image": "https://a.org/b.png"},
            "'https://a.org/b.png' is a remote address; .* not downloaded",
        ),
        (chat() | {"system": 4}, r"system is a number \(4\), not text"),
        (openai({"type": "video"}), "message 1 holds a part of type 'video'; known are parts of type text, image"),
        (openai({"type": "text"}), "message 1 holds a part of type 'text'"),
        (openai({"type": "text", "text": 5}), "message 1 holds a part of type 'text'"),
        (openai({"type": "image_url"}), "message 1: image_url is null, not a path"),
        (openai({"type": "image_url", "image_url": {"url": 5}}), r"message 1: image_url is a number \(5\)"),
        ({"messages": [{"role": "user", "content": [5]}]}, r"message 1 holds a number \(5\); known are"),
        (chat("a\ud800b"), r"message 1 holds the broken character '\\ud800'"),
        (openai(TEXT | {"text": "\udfff"}), r"message 1 holds the broken character '\\udfff'"),
        (chat("<image>", images=["\ud800.png"]), r"image holds the broken character '\\ud800'"),
        (chat() | {"system": "\ud800"}, r"system holds the broken character"),
        (openai(), r"message 1 \(user\) is empty"),
    ],
)
def test_what_is_wrong_is_said(row: Any, what: str) -> None:
    with pytest.raises(ValueError, match=rf"^rows.jsonl:17: .*{what}"):
        parse(row)


def test_an_empty_system_message_is_none() -> None:
    assert parse(turns(("system", ""), ("human", "a"), ("gpt", "b"))) == parse(turns(("human", "a"), ("gpt", "b")))
    assert parse(turns(("human", "a"), ("gpt", "b"), system="")) == parse(turns(("human", "a"), ("gpt", "b")))
    with pytest.raises(ValueError, match="message 2 is from assistant where user must speak"):
        parse(turns(("system", ""), ("gpt", "b")))


def test_a_question_alone_is_a_prompt() -> None:
    assert parse(turns(("human", "Hi")), needs_answer=False).messages == (Message("user", ("Hi",)),)
    with pytest.raises(ValueError, match="the only message is from the system"):
        parse(turns(("system", "Hi")), needs_answer=False)
