"""A rendered conversation's text as token ids, with slots where its images go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megavlm.data.chat_template import BOS, EOS, Segment, Special
from megavlm.data.tokenizers import Tokenizer

ImageWrapper = Literal["nvlm", "internvl", "minigpt4", "none"]

IMAGE_WRAPPERS: dict[ImageWrapper, tuple[str, str]] = {
    "nvlm": ("<Image>", "</Image>"),
    "internvl": ("<img>", "</img>"),
    "minigpt4": ("<Img>", "</Img>"),
    "none": ("", ""),
}
"""The text before and after an image; a special token where the tokenizer has one of that spelling (InternVL's own)."""


@dataclass(frozen=True)
class TokenRun:
    """Token ids that are all trained, or all not."""

    ids: tuple[int, ...]
    is_trained: bool
    turn: int = 0
    """Which turn of the sample they belong to."""
    weight: float = 1.0
    """Of their loss, as the sample gives it."""


@dataclass(frozen=True)
class ImageSlot:
    """Where an image goes. The slots of a sample stand in the order of its images."""


def encode_segments(
    segments: Sequence[Segment], tokenizer: Tokenizer, wrapper: ImageWrapper
) -> list[TokenRun | ImageSlot]:
    """Encode the text of a rendered conversation.

    Neighbouring texts that are both trained, or both not, are encoded as one, as the tokenizers of chat models were
    trained: a template's ``user`` line, the wrapper ``<Image>`` and the user's words may share tokens.

    Args:
        segments: a rendered conversation.
        tokenizer: its special symbols are looked up, its text is encoded plain.
        wrapper: the text or the special tokens around each image.

    Raises:
        ValueError: the vocabulary lacks a special symbol of the template.
    """
    before, after = IMAGE_WRAPPERS[wrapper]
    runs: list[TokenRun | ImageSlot] = []
    text, kind = "", (False, 0, 1.0)
    starts_text = True

    def flush() -> None:
        nonlocal text, starts_text
        if text:
            runs.append(TokenRun(tuple(tokenizer.encode(text, starts_text=starts_text)), *kind))
            starts_text = False
        text = ""

    def add_text(addition: str, segment: Segment | None = None) -> None:
        nonlocal text, kind
        wanted = _kind(segment)
        if wanted != kind:
            flush()
        text, kind = text + addition, wanted

    def add_wrapper(spelling: str) -> None:
        nonlocal starts_text
        token_id = tokenizer.special_id(spelling)
        if token_id is None:
            add_text(spelling)
            return
        flush()
        runs.append(TokenRun((token_id,), *_kind(None)))
        starts_text = False

    for segment in segments:
        if isinstance(segment.content, str):
            add_text(segment.content, segment)
        elif isinstance(segment.content, Special):
            flush()
            runs.append(TokenRun((special_token_id(segment.content, tokenizer),), *_kind(segment)))
            starts_text = starts_text and segment.content == BOS
        else:
            add_wrapper(before)
            flush()
            runs.append(ImageSlot())
            starts_text = False
            add_wrapper(after)
    flush()
    return runs


def _kind(segment: Segment | None) -> tuple[bool, int, float]:
    """What must be alike in texts that are encoded as one: trained or not, turn and weight. None: around an image."""
    if segment is None or not segment.is_trained or segment.weight == 0.0:
        return (False, 0, 1.0)
    return (True, segment.turn, segment.weight)


def special_token_id(special: Special, tokenizer: Tokenizer) -> int:
    """Look up a special symbol.

    Raises:
        ValueError: the vocabulary has no such symbol.
    """
    if special == EOS:
        return tokenizer.eos_id
    token_id = tokenizer.bos_id if special == BOS else tokenizer.special_id(special.name)
    if token_id is None:
        raise ValueError(
            f"data.chat_template: needs the special token {special.name!r}, and the tokenizer has none. "
            "Choose another template or tokenizer."
        )
    return token_id
