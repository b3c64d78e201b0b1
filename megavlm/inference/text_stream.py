"""Text of tokens that come one by one."""

from megavlm.data.tokenizers import Tokenizer

_UNFINISHED = "\ufffd"  # what a decoder puts for bytes that do not make a character yet


class TextStream:
    """Turns tokens into text piece by piece. A character is given when all of its tokens are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """Take the next token; return the text that is new."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith(_UNFINISHED) else self._give(text)

    def end(self) -> str:
        """Return what was held back."""
        return self._give(self._tokenizer.decode(self._ids)) if self._ids else ""

    def _give(self, text: str) -> str:
        new = text[len(self._given) :]
        self._given = text
        return new
