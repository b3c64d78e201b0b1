"""Rows that are no conversation, as messages: captions, transcriptions, questions and documents."""

from collections.abc import Mapping
from typing import Any

PLACEHOLDER = "<image>"
"""Where an image stands inside a text; the files of LLaVA and LLaMA-Factory use the same."""

SHAPES: dict[str, str] = {
    "conversations": "turns of LLaVA and ShareGPT",
    "messages": "turns of OpenAI and LLaMA-Factory",
    "caption": "of the row's image, which stands before it; `prompt` is asked first if the row has one",
    "transcription": "the text in the row's image; `prompt` as above",
    "question": "about the row's images, which stand before it unless it has placeholders; with `answer`",
    "text": "a document, its images at its placeholders; all text is learnt",
    "texts": "a document as two lists of equal length, `texts` and `images`: at each place one of both, the other null",
}
"""The key that says what a row is, and what it says. The first two win over the others."""

_TURNS = ("conversations", "messages")
_DOCUMENTS = ("text", "texts")


def shape_of(row: Mapping[str, Any]) -> str:
    """Say which of :data:`SHAPES` a row has.

    Raises:
        ValueError: none, or several.
    """
    turns = [key for key in _TURNS if key in row]
    found = turns or [key for key in SHAPES if row.get(key) is not None]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(sorted(map(str, row))) or "none"
    if turns:
        raise ValueError("the row has both conversations and messages")
    if found:
        raise ValueError(f"the row has {' and '.join(found)}, which say different things")
    raise ValueError(
        f"the row has neither conversations nor messages (keys: {keys}), nor {', '.join(list(SHAPES)[2:])}"
    )


def is_document(shape: str) -> bool:
    """Whether a row of that shape is a document."""
    return shape in _DOCUMENTS


def as_messages(row: Mapping[str, Any], shape: str, num_images: int, *, needs_answer: bool) -> list[dict[str, Any]]:
    """Spell out a caption, transcription or question as messages.

    Args:
        row: the decoded JSON.
        shape: of :func:`shape_of`; no turns and no document.
        num_images: of the row.
        needs_answer: whether a question must have its answer.

    Raises:
        ValueError: a text is missing or no text.
    """
    images: list[dict[str, Any]] = [{"type": "image"}] * num_images
    if shape != "question":
        if not num_images:
            raise ValueError(f"the row has a {shape}, but no image")
        prompt = _text(row, "prompt") if row.get("prompt") is not None else ""
        asked = [*images, {"type": "text", "text": f"\n{prompt}"}] if prompt else images
        return [{"role": "user", "content": asked}, _says("assistant", _text(row, shape))]
    question = _text(row, "question")
    if PLACEHOLDER in question:
        user: dict[str, Any] = {"role": "user", "content": question}
    elif images:
        user = {"role": "user", "content": [*images, {"type": "text", "text": f"\n{question}"}]}
    else:
        user = _says("user", question)
    if row.get("answer") is None and not needs_answer:
        return [user]
    return [user, _says("assistant", _text(row, "answer"))]


def document_text(row: Mapping[str, Any], shape: str) -> str | list[str | None]:
    """Return a document's text with placeholders; or, of two lists, its pieces of text and None for each image.

    Raises:
        ValueError: the row's lists do not fit each other, or hold something else.
    """
    if shape == "text":
        return _text(row, "text")
    texts, images = row["texts"], row.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise ValueError("texts and images are not two lists of equal length")
    pieces: list[str | None] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise ValueError(
                f"texts[{number}] and images[{number}] are {'both' if text is not None else 'neither'} given"
            )
        if text is not None and not isinstance(text, str):
            raise ValueError(f"texts[{number}] is no text")
        pieces.append(text)
    return pieces


def _says(role: str, text: str) -> dict[str, Any]:
    # as a part, in which a placeholder is text
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {'missing' if value is None else 'no text'}")
    return value
