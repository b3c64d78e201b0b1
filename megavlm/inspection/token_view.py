"""Tells the tokens of a sample apart one by one: what each says, and who says it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megavlm.data import Conversation, ImageRef, SampleProcessor, Tokenizer
from megavlm.data.chat_template import BOS, CHAT_TEMPLATES, EOS, Segment, Special
from megavlm.data.encoding import IMAGE_WRAPPERS, TokenRun, special_token_id
from megavlm.inspection.view import SampleView

Role = Literal["system", "user", "assistant", "document", "template"]
"""Who says a token of text; ``template``: the chat template, or the wrapper of an image."""

Category = Literal["system", "user", "assistant", "document", "template", "special", "tag", "image"]
"""The role of a token of text; or what other tokens are."""

CATEGORIES: tuple[Category, ...] = ("system", "user", "assistant", "document", "template", "special", "tag", "image")

# Tokens that one character is looked for in: the bytes of one, or pieces that each hold a part of one.
_MOST_TOKENS_OF_A_CHARACTER = 8
_CUT_OFF = "\ufffd"


@dataclass(frozen=True)
class TokenView:
    """One token."""

    text: str
    """Empty where a token only goes on with a character that an earlier one began, and for image tokens."""
    category: Category
    message: int | None
    """Number of the message that it belongs to, from 0; None: of the template, a tag or an image."""
    is_trained: bool
    tile: int | None
    """Number of the tile in the sample, of tags and image tokens."""


def view_tokens(view: SampleView, processor: SampleProcessor) -> list[TokenView]:
    """Tell the tokens of a sample apart.

    Args:
        view: of the sample.
        processor: that made it.

    Returns:
        One for each token.
    """
    tokenizer = processor.tokenizer
    ids = view.sample.tokens.tolist()
    names = special_names(processor)
    speakers: list[tuple[Role, int | None]] = [("template", None)] * len(ids)
    for start, pieces, stretch in _stretches(view, processor):
        speakers[start : start + len(stretch)] = _speakers(token_texts(stretch, tokenizer), pieces)
    tokens: list[TokenView] = []
    for span in view.spans:
        part = ids[span.start : span.stop]
        if span.kind == "image":
            tokens += [TokenView("", "image", None, False, span.tile)] * len(part)
            continue
        for number, (token, text) in enumerate(zip(part, token_texts(part, tokenizer, names), strict=True)):
            role, message = speakers[span.start + number]
            is_special = token in names or text == f"<#{token}>"
            category: Category = "special" if is_special else "tag" if span.kind == "tag" else role
            tokens.append(TokenView(text, category, message, span.kind == "trained", span.tile))
    return tokens


def special_names(processor: SampleProcessor) -> dict[int, str]:
    """Spellings of the special tokens that a sample may hold, by id."""
    tokenizer = processor.tokenizer
    names = {
        special_token_id(special, tokenizer): special.name
        for special in CHAT_TEMPLATES[processor.config.chat_template].specials
        if special not in (BOS, EOS)
    }
    for spelling in IMAGE_WRAPPERS[processor.config.image_wrapper]:
        if spelling and (token := tokenizer.special_id(spelling)) is not None:
            names[token] = spelling
    names.setdefault(tokenizer.eos_id, f"<{EOS.name}>")
    if tokenizer.bos_id is not None:
        names.setdefault(tokenizer.bos_id, f"<{BOS.name}>")
    return names


def token_texts(ids: Sequence[int], tokenizer: Tokenizer, names: dict[int, str] | None = None) -> list[str]:
    """Return the text of each token; joined they are the text of all.

    A character that is made of several tokens is the text of the first of them, the others have none. Special tokens
    have the text of ``names``, or their number: ``<#17>``.
    """
    # Behind other text: a first space would not be shown, as tokenizers put one before a text themselves.
    before = tokenizer.encode("a")
    length = len(tokenizer.decode(before))

    def decode(some: Sequence[int]) -> str:
        return tokenizer.decode([*before, *some])[length:]

    texts: list[str] = []
    while len(texts) < len(ids):
        start = len(texts)
        if names is not None and ids[start] in names:
            texts.append(names[ids[start]])
            continue
        text, num_tokens = decode(ids[start : start + 1]), 1
        for more in range(2, min(_MOST_TOKENS_OF_A_CHARACTER, len(ids) - start) + 1):
            if not text.endswith(_CUT_OFF):
                break
            if _CUT_OFF not in (longer := decode(ids[start : start + more])):
                text, num_tokens = longer, more
        texts += [text or f"<#{ids[start]}>", *[""] * (num_tokens - 1)]
    return texts


_Piece = tuple[str, Role, int | None]


def _stretches(view: SampleView, processor: SampleProcessor) -> Iterator[tuple[int, list[_Piece], list[int]]]:
    """The text between special tokens and images: where it begins, the pieces that it was made of, and its ids.

    Special tokens and images stand in the rendered conversation and among the tokens, so each stretch is found again
    whatever the tokenizer makes of the text before it.
    """
    tokenizer = processor.tokenizer
    wrapper = IMAGE_WRAPPERS[processor.config.image_wrapper]
    before, after = (text if tokenizer.special_id(text) is None else "" for text in wrapper)
    pieces: list[list[_Piece]] = [[]]
    for segment, role, message in _spoken(view.plan.segments, view.conversation, processor):
        if isinstance(segment.content, str):
            pieces[-1].append((segment.content, role, message))
        elif isinstance(segment.content, ImageRef):
            pieces[-1].append((before, "template", None))
            pieces.append([(after, "template", None)])
        else:
            pieces.append([])
    specials = {token for text in wrapper if (token := tokenizer.special_id(text)) is not None}
    breaks = _break_ids(view.plan.segments, tokenizer)
    number, position = 0, 0
    images = iter(view.plan.images)
    stretch: list[int] = []
    start = 0
    for run in view.plan.runs:
        if isinstance(run, TokenRun):
            is_break = len(run.ids) == 1 and run.ids[0] in breaks
            if not is_break and not (len(run.ids) == 1 and run.ids[0] in specials):
                start = position if not stretch else start
                stretch += run.ids
            position += len(run.ids)
        else:
            is_break = True
            position += next(images).tokens.num_tokens
        if is_break:
            yield start, pieces[min(number, len(pieces) - 1)], stretch
            number, stretch = number + 1, []
    yield start, pieces[min(number, len(pieces) - 1)], stretch


def _break_ids(segments: Sequence[Segment], tokenizer: Tokenizer) -> set[int]:
    return {special_token_id(one.content, tokenizer) for one in segments if isinstance(one.content, Special)}


def _spoken(
    segments: Sequence[Segment], conversation: Conversation, processor: SampleProcessor
) -> Iterator[tuple[Segment, Role, int | None]]:
    """Who says each piece of a rendered conversation. Its parts are the very strings of the messages, in order."""
    config = processor.config
    system = (
        CHAT_TEMPLATES[config.chat_template].default_system if config.system_prompt is None else config.system_prompt
    )
    parts = [(part, number) for number, message in enumerate(conversation.messages) for part in message.parts if part]
    place = 0
    for segment in segments:
        ahead = (here for here in range(place, len(parts)) if parts[here][0] is segment.content)
        if segment.content and (found := next(ahead, None)) is not None:
            number, place = parts[found][1], found + 1
            yield segment, "document" if conversation.is_document else conversation.messages[number].role, number
        elif isinstance(segment.content, str) and system and segment.content == system:
            yield segment, "system", None
        else:
            yield segment, "template", None


def _speakers(texts: Sequence[str], pieces: Sequence[_Piece]) -> list[tuple[Role, int | None]]:
    """Who says each token of a stretch; one with characters of several pieces belongs to that of its first that is no
    space. Tokenizers may add, drop and join spaces; where they change more, the pieces have their shares of the text.
    """
    expected, decoded = "".join(text for text, _, _ in pieces), "".join(texts)
    has_spaces = expected.startswith(decoded)
    if not has_spaces:
        expected, decoded = _without_spaces(expected), _without_spaces(decoded)
    owners = [
        (role, message) for text, role, message in pieces for letter in text if has_spaces or not letter.isspace()
    ]
    if not owners:
        return [("template", None)] * len(texts)
    is_exact = expected.startswith(decoded)
    speakers: list[tuple[Role, int | None]] = []
    place = 0
    for text in texts:
        length = len(text) if has_spaces else len(_without_spaces(text))
        first = place + (len(text) - len(text.lstrip()) if has_spaces and text.strip() else 0)
        if not length:  # a space, or a part of a character: of what stands before it
            first -= 1
        here = first if is_exact else first * len(owners) // len(decoded)
        speakers.append(owners[max(0, min(here, len(owners) - 1))])
        place += length
    return speakers


def _without_spaces(text: str) -> str:
    return "".join(text.split())
