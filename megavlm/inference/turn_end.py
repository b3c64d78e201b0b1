"""Where an answer ends."""

from collections.abc import Set

from megavlm.data.tokenizers import Tokenizer


class TurnEnd:
    """Follows one answer token by token. Tokens that may be the beginning of the closing text are held back.

    The closing text itself is no part of the answer, nor is the token in which it begins.
    """

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: Set[int], stop_text: str) -> None:
        """Begin an answer.

        Args:
            tokenizer: what decodes.
            stop_token_ids: tokens that end the answer.
            stop_text: text that ends it (``###``); empty: none does.
        """
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._stop_text = stop_text
        self._held: list[int] = []
        self.is_open = True
        """Whether the answer goes on."""

    def add(self, token: int) -> list[int]:
        """Take the next token; return those that belong to the answer for certain. None do once it has ended."""
        if not self.is_open:
            return []
        if token in self._stop_token_ids:
            self.is_open = False
            return self.rest()
        if not self._stop_text:
            return [token]
        self._held.append(token)
        text = self._tokenizer.decode(self._held)
        if self._stop_text in text:
            self.is_open = False
            self._held = self._before(text.index(self._stop_text))
            return self.rest()
        return self._release(len(self._held) - self._num_possible(text))

    def rest(self) -> list[int]:
        """Return what is held back: the answer goes on no further."""
        return self._release(len(self._held))

    def _release(self, count: int) -> list[int]:
        released, self._held = self._held[:count], self._held[count:]
        return released

    def _before(self, num_characters: int) -> list[int]:
        """Held tokens whose text ends before a character."""
        count = len(self._held)
        while count and len(self._tokenizer.decode(self._held[:count])) > num_characters:
            count -= 1
        return self._held[:count]

    def _num_possible(self, text: str) -> int:
        """How many of the last held tokens may be the beginning of the closing text."""
        lengths = range(len(self._stop_text) - 1, 0, -1)
        num_characters = next((length for length in lengths if text.endswith(self._stop_text[:length])), 0)
        count = 0
        while (
            count < len(self._held)
            and len(self._tokenizer.decode(self._held[len(self._held) - count :])) < num_characters
        ):
            count += 1
        return count
