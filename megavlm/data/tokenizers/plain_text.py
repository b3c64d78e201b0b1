"""Encodes text so that no special token comes out of it, whatever its spelling."""

import itertools
import re
from collections.abc import Callable, Iterable

Encoder = Callable[[str], list[int]]

_LOOKS_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")


def looks_special(piece: str) -> bool:
    """Whether a vocabulary entry is spelt like a control symbol, ``<|im_start|>``.

    Vocabularies often hold such symbols as ordinary entries that text can reach.
    """
    return _LOOKS_SPECIAL.fullmatch(piece) is not None


class PlainTextGuard:
    """Keeps a set of reserved token ids out of encoded text."""

    def __init__(self, reserved: dict[str, int]) -> None:
        """Reserve tokens.

        Args:
            reserved: spelling and id of each token that text must not produce.
        """
        self._ids = frozenset(reserved.values())
        spellings = sorted((text for text in reserved if text), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, spellings))) if spellings else None

    def encode(self, text: str, first: Encoder, rest: Encoder) -> list[int]:
        """Encode ``text``; where a reserved id comes out, encode its spelling in two halves instead.

        Args:
            text: plain text.
            first: encodes the beginning of the text.
            rest: encodes a text that continues another.

        Returns:
            Token ids, none of them reserved.

        Raises:
            ValueError: a single character of the text encodes to a reserved id.
        """
        ids = first(text)
        if self._ids.isdisjoint(ids):
            return ids
        ids = _encode_pieces(self._break_spellings(text), first, rest)
        if self._ids.isdisjoint(ids):
            return ids
        # The tokenizer's own normalisation (full-width letters and the like) made the spelling: take it apart wholly.
        ids = _encode_pieces(text, first, rest)
        if not self._ids.isdisjoint(ids):
            raise ValueError(f"text={text[:80]!r}: one of its characters encodes to a special token. Remove it.")
        return ids

    def _break_spellings(self, text: str) -> list[str]:
        if self._pattern is None:
            return [text]
        cuts = [0, *(match.start() + 1 for match in self._pattern.finditer(text)), len(text)]
        return [text[start:stop] for start, stop in itertools.pairwise(cuts) if stop > start]


def _encode_pieces(pieces: Iterable[str], first: Encoder, rest: Encoder) -> list[int]:
    ids: list[int] = []
    for number, piece in enumerate(pieces):
        ids.extend((rest if number else first)(piece))
    return ids
