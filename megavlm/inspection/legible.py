"""Makes text of strangers legible: what cannot be seen, or would turn its surroundings around, becomes an escape."""

import unicodedata

# Joiners are parts of emoji and of Persian and Indic words.
_KEPT = "\u200c\u200d"
_INVISIBLE = ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")


def legible(text: str) -> str:
    """Return text with its control characters, marks of direction, lone surrogates and unassigned characters as
    ``\\n``, ``\\x07`` or ``\\u202e``, and spaces of other kinds likewise. The result can always be written as UTF-8."""
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character == " " or character in _KEPT:
        return character
    category = unicodedata.category(character)
    if category in _INVISIBLE or category == "Zs":
        return character.encode("unicode_escape").decode("ascii")
    return character
