"""One row of a data file as a conversation, whichever of the known shapes it has."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megavlm.data.grounding import CoordinateStyle, RegionSupply
from megavlm.data.row_shape import PLACEHOLDER, as_messages, document_text, is_document, shape_of

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class ImageRef:
    """An image by name; not yet read."""

    source: str
    """Path of a file, or a ``data:`` URI."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    parts: tuple[str | ImageRef, ...]
    """Text and images in the order in which they are read."""
    weight: float = 1.0
    """Of the loss of an assistant's turn; 0: the model does not learn to write it."""

    @property
    def text(self) -> str:
        """The turn without its images."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant in turn; or a document."""

    messages: tuple[Message, ...]
    is_document: bool = False
    """Whether it is text, with or without images in it, of which everything is learnt: one message of the assistant,
    written without any template."""

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """All images in the order in which they are read."""
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, ImageRef))


def parse_conversation(
    row: Any,
    where: str,
    image_root: Path,
    *,
    needs_answer: bool = True,
    coordinate_style: CoordinateStyle = "mm1_5",
) -> Conversation:
    """Read a row, whichever of :data:`megavlm.data.row_shape.SHAPES` it has.

    Conversations are ``conversations`` with ``from``/``value`` (LLaVA, ShareGPT) and ``messages`` with
    ``role``/``content`` (LLaMA-Factory, OpenAI). Images are the row's ``image`` or ``images`` (one path or a list), at
    the ``<image>`` placeholders of the texts; or parts of a ``content`` list (``{"type": "image_url",
    "image_url": {"url": ...}}``, ``{"type": "image", "image": ...}``; without a source, the next of the row's images).
    In a ``content`` list ``<image>`` inside a text is text. A ``system`` key gives a system message; ``weight`` in a
    message of the assistant is the weight of its loss (OpenAI's, but any number). ``<box>`` and ``<point>`` in texts
    stand for the row's ``boxes`` and ``points`` (:mod:`megavlm.data.grounding`).

    Args:
        row: the decoded JSON.
        where: names the row in errors, ``file.jsonl:17``.
        image_root: relative paths of images begin here.
        needs_answer: whether the last message must be the assistant's.
        coordinate_style: how boxes and points are written.

    Raises:
        ValueError: beginning with ``where``, saying what is wrong with the row.
    """
    return _RowParser(where, image_root, coordinate_style).parse(row, needs_answer)


class _RowParser:
    """Parses one row; holds what every error and every image needs."""

    def __init__(self, where: str, image_root: Path, coordinate_style: CoordinateStyle) -> None:
        self._where = where
        self._image_root = image_root
        self._coordinate_style = coordinate_style
        self._regions = RegionSupply({}, 0, coordinate_style)

    def parse(self, row: Any, needs_answer: bool) -> Conversation:
        if not isinstance(row, Mapping):
            raise self._error(f"the row is {_name(row)}, not an object")
        try:
            conversation = self._parse(row, needs_answer)
            self._regions.finish()
        except _RowError:
            raise
        except ValueError as error:  # of the parts that do not know where the row stands
            raise self._error(str(error)) from None
        return conversation

    def _parse(self, row: Mapping[str, Any], needs_answer: bool) -> Conversation:
        shape = shape_of(row)
        images = [] if shape == "texts" else self._row_images(row)
        self._regions = RegionSupply(row, len(images), self._coordinate_style)
        if is_document(shape):
            return self._document(row, shape, images)
        if shape not in ("conversations", "messages"):
            row = dict(row) | {"messages": as_messages(row, shape, len(images), needs_answer=needs_answer)}
            shape = "messages"
        turns, role_key, content_key = self._turns(row, shape)
        self._check_placeholders(sum(self._count_placeholders(turn, content_key) for turn in turns), len(images))
        supply = iter(images)
        messages = [
            self._message(turn, number, role_key, content_key, supply) for number, turn in enumerate(turns, start=1)
        ]
        system = row.get("system")
        if system:
            if not isinstance(system, str):
                raise self._error(f"system is {_name(system)}, not text")
            messages.insert(0, Message("system", (self._text(system, "system"),)))
        if not messages[0].parts:
            del messages[0]  # an empty system message is none
        self._check_order(messages, len(messages) - len(turns), needs_answer)
        if needs_answer and not any(message.role == "assistant" and message.weight for message in messages):
            raise self._error("every message of the assistant has weight 0, so there is nothing to learn")
        return Conversation(tuple(messages))

    def _document(self, row: Mapping[str, Any], shape: str, images: list[ImageRef]) -> Conversation:
        text = document_text(row, shape)
        if isinstance(text, str):
            self._check_placeholders(text.count(PLACEHOLDER), len(images))
            parts = _split_text(self._text(text, "text"), iter(images))
        else:
            entries = zip(text, row["images"], strict=True)
            parts = [
                self._text(piece, "texts") if piece is not None else self._image(image, "images")
                for piece, image in entries
            ]
        filled = [self._regions.fill(part) if isinstance(part, str) else part for part in parts]
        message = Message("assistant", tuple(part for part in filled if part != ""))
        if not message.text.strip():
            raise self._error("the document has no text")
        return Conversation((message,), is_document=True)

    def _check_placeholders(self, num_placeholders: int, num_images: int) -> None:
        if num_placeholders != num_images:
            raise self._error(
                f"{num_placeholders} {PLACEHOLDER} placeholder(s) in the texts, but {num_images} image(s) in the row"
            )

    def _turns(self, row: Mapping[str, Any], shape: str) -> tuple[list[Any], str, str]:
        turns = row[shape]
        if not isinstance(turns, list):
            raise self._error(f"{shape} is {_name(turns)}, not a list")
        if not turns:
            raise self._error(f"{shape} is empty")
        for number, turn in enumerate(turns, start=1):
            if not isinstance(turn, Mapping):
                raise self._error(f"message {number} is {_name(turn)}, not an object")
        # Files of both families are seen with the other's key names; the first message decides.
        role_key = "from" if "from" in turns[0] else "role"
        return turns, role_key, "value" if "value" in turns[0] else "content"

    def _row_images(self, row: Mapping[str, Any]) -> list[ImageRef]:
        present = [key for key in ("image", "images") if row.get(key) not in (None, "", [])]
        if len(present) > 1:
            raise self._error("the row has both image and images")
        if not present:
            return []
        value = row[present[0]]
        return [self._image(entry, present[0]) for entry in (value if isinstance(value, list) else [value])]

    def _image(self, entry: Any, key: str) -> ImageRef:
        if isinstance(entry, Mapping) and len(entry.keys() & {"path", "url"}) == 1:
            entry = entry.get("path", entry.get("url"))
        if not isinstance(entry, str):
            raise self._error(f"{key} is {_name(entry)}, not a path")
        if not self._text(entry, key) or "\0" in entry:
            raise self._error(f"{key} is an empty or broken path")
        if entry.startswith("data:"):
            return ImageRef(entry)
        scheme, separator, rest = entry.partition("://")
        if separator and scheme == "file":
            return ImageRef(rest)
        if separator:
            raise self._error(f"{key}={entry[:100]!r} is a remote address; images are not downloaded")
        return ImageRef(os.path.join(self._image_root, entry))

    def _count_placeholders(self, turn: Mapping[str, Any], content_key: str) -> int:
        content = turn.get(content_key)
        if isinstance(content, str):
            return content.count(PLACEHOLDER)
        if isinstance(content, list):
            return sum(isinstance(part, Mapping) and _is_unnamed_image(part) for part in content)
        return 0

    def _message(
        self, turn: Mapping[str, Any], number: int, role_key: str, content_key: str, supply: Iterator[ImageRef]
    ) -> Message:
        for key in (role_key, content_key):
            if key not in turn:
                raise self._error(f"message {number} has no {key} (keys: {', '.join(sorted(map(str, turn)))})")
        role = _ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise self._error(
                f"message {number} has the unknown {role_key} {turn[role_key]!r}; known are {', '.join(_ROLES)}"
            )
        content = turn[content_key]
        if isinstance(content, str):
            parts = _split_text(self._text(content, f"message {number}"), supply)
        elif isinstance(content, list):
            parts = [self._part(part, number, supply) for part in content]
        else:
            raise self._error(f"message {number}: {content_key} is {_name(content)}, not text or a list of parts")
        filled = [self._regions.fill(part) if isinstance(part, str) else part for part in parts]
        weight = self._weight(turn, number) if role == "assistant" else 1.0
        message = Message(role, tuple(part for part in filled if part != ""), weight)
        is_first_system = role == "system" and number == 1
        if not is_first_system and not any(isinstance(part, ImageRef) or part.strip() for part in message.parts):
            raise self._error(f"message {number} ({role}) is empty")
        if role == "assistant" and not message.text.strip():
            raise self._error(f"message {number} (assistant) has images but no text")
        return message

    def _weight(self, turn: Mapping[str, Any], number: int) -> float:
        weight = turn.get("weight")
        if weight is None:
            return 1.0
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight <= _LARGEST_WEIGHT:
            raise self._error(f"message {number}: weight is {weight!r}, not a number from 0 to {_LARGEST_WEIGHT}")
        return float(weight)

    def _part(self, part: Any, number: int, supply: Iterator[ImageRef]) -> str | ImageRef:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(text := part.get("text"), str):
            return self._text(text, f"message {number}")
        if kind in ("image", "image_url"):
            if _is_unnamed_image(part):
                return next(supply)
            source = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
            return self._image(source, f"message {number}: {kind}")
        shown = f"a part of type {kind!r}" if kind is not None else _name(part)
        raise self._error(f"message {number} holds {shown}; known are parts of type text, image and image_url")

    def _check_order(self, messages: list[Message], num_inserted: int, needs_answer: bool) -> None:
        if not any(message.role == "assistant" for message in messages) and needs_answer:
            raise self._error("no message is from the assistant, so there is nothing to learn")
        first_turn = 1 if messages[0].role == "system" else 0
        if first_turn == len(messages):
            raise self._error("the only message is from the system")
        for index in range(first_turn, len(messages)):
            role, expected = messages[index].role, "assistant" if (index - first_turn) % 2 else "user"
            if role != expected:
                raise self._error(
                    f"message {index + 1 - num_inserted} is from {role} where {expected} must speak; "
                    "user and assistant take turns"
                )
        if needs_answer and messages[-1].role != "assistant":
            raise self._error("the last message is from the user, and nothing answers it")

    def _text(self, text: str, what: str) -> str:
        """Refuse halves of surrogate pairs, which JSON can spell and no tokenizer can read."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self._error(f"{what} holds the broken character {text[error.start]!a}") from None
        return text

    def _error(self, what: str) -> ValueError:
        return _RowError(f"{self._where}: {what}.")


class _RowError(ValueError):
    """An error that names its row."""


_LARGEST_WEIGHT = 1000
_IMAGE_KEYS = ("image", "image_url", "path", "url")


def _is_unnamed_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image" and all(part.get(key) is None for key in _IMAGE_KEYS)


def _split_text(text: str, supply: Iterator[ImageRef]) -> list[str | ImageRef]:
    first, *others = text.split(PLACEHOLDER)
    parts: list[str | ImageRef] = [first]
    for other in others:
        parts += [next(supply), other]
    return parts


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"a number ({value})" if isinstance(value, int | float) else type(value).__name__)
