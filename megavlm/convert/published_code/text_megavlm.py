"""Text of prompts as token ids: special tokens by their spelling, everything else as plain text.

This file travels inside exported folders: it needs tokenizers, and nothing else.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import normalizers

# Put into text that is not ours to read, so that no spelling of a special token is left in it. No character of Unicode.
_MARK = "\ufdd0"
_PREFIX_OFF: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}
# What SentencePiece does to the beginning of a text.
_RULES: dict[str, list[Any]] = {
    "squeeze": [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")],
    "prefix": [normalizers.Prepend("\u2581")],
}


class PromptText:
    """Reads prompts: special tokens by their spelling, the text between them as plain text."""

    def __init__(self, tokenizer: Any, settings: Mapping[str, Any]) -> None:
        """Make encoders of the folder's tokenizer by the settings of ``processor_config.json``."""
        self._reserved: dict[str, int] = dict(settings["reserved"])
        self._reserved_ids = frozenset(self._reserved.values())
        spellings = sorted(self._reserved, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, spellings)))
        self.image_token: str = settings["image_token"]
        self._bos_id = settings["bos_id"]
        self._around_image: tuple[str, str] = tuple(settings["image_wrapper"])
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        hidden = frozenset(settings["unreadable_ids"])
        rest = {name: _without_prefix(state[name]) for name in ("normalizer", "pre_tokenizer")}
        self._rest = _backend(_without(state | rest, hidden), [])
        rules = settings["first_text"]  # None: those of the tokenizer itself
        self._first = (
            _backend(_without(state, hidden), []) if rules is None else _backend(_without(state | rest, hidden), rules)
        )

    def shielded(self, conversation: Any) -> Any:
        """The conversation with marks in its texts, so that no special token is spelt in them."""
        if isinstance(conversation, Mapping):
            texts = {name: conversation[name] for name in ("content", "text") if name in conversation}
            return {**conversation, **{name: self.shielded(value) for name, value in texts.items()}}
        if isinstance(conversation, list | tuple):
            return [self.shielded(entry) for entry in conversation]
        if not isinstance(conversation, str) or not conversation:
            return conversation
        text = conversation
        while (match := self._pattern.search(text)) is not None:
            if len(match[0]) == 1:
                raise ValueError(f"text={text[:80]!r}: one of its characters encodes to a special token. Remove it.")
            text = self._pattern.sub(_marked, text)
        return _MARK + text + _MARK

    def runs(self, prompt: str) -> list[list[int] | None]:
        """Token ids of a prompt, None where an image stands."""
        runs: list[list[int] | None] = []
        text, starts_text = "", True
        for piece, is_special in self._pieces(prompt):
            if not is_special:
                text += piece
                continue
            if text:
                runs.append(self.encode(text, starts_text=starts_text))
                starts_text = False
            text, is_image = "", piece == self.image_token
            runs.append(None if is_image else [self._reserved[piece]])
            starts_text = starts_text and not is_image and self._reserved[piece] == self._bos_id
        return [*runs, self.encode(text, starts_text=starts_text)] if text else runs

    def _pieces(self, prompt: str) -> Iterator[tuple[str, bool]]:
        """Texts, and whether each is a special token. An image is three: what is around it may be either."""
        before, after = self._around_image
        end = 0
        for match in self._pattern.finditer(prompt):
            yield prompt[end : match.start()].replace(_MARK, ""), False
            for piece in (before, match[0], after) if match[0] == self.image_token else (match[0],):
                yield piece, piece in self._reserved
            end = match.end()
        yield prompt[end:].replace(_MARK, ""), False

    def encode(self, text: str, *, starts_text: bool = False) -> list[int]:
        """Encode plain text; where a special token would come out, its spelling is taken apart.

        Raises:
            ValueError: a single character encodes to a special token.
        """
        first = self._first if starts_text else self._rest
        for pieces in ([text], self._broken(text), list(text)):
            ids = [index for number, piece in enumerate(pieces) for index in (self._rest if number else first)(piece)]
            if self._reserved_ids.isdisjoint(ids):
                return ids
        raise ValueError(f"text={text[:80]!r}: one of its characters encodes to a special token. Remove it.")

    def _broken(self, text: str) -> list[str]:
        cuts = [0, *(match.start() + 1 for match in self._pattern.finditer(text)), len(text)]
        return [text[start:stop] for start, stop in itertools.pairwise(cuts) if stop > start]


def _marked(match: re.Match[str]) -> str:
    """A spelling that is none any more."""
    return match[0][0] + _MARK + match[0][1:]


def _backend(state: Mapping[str, Any], rules: Sequence[str]) -> Callable[[str], list[int]]:
    """An encoder that adds, cuts and fills nothing; ``rules``: names of what is done to a text before."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
    backend.no_truncation()
    backend.no_padding()
    if rules:
        given = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([*given, *(rule for name in rules for rule in _RULES[name])])
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _without(state: Mapping[str, Any], hidden: frozenset[int]) -> dict[str, Any]:
    """Take tokens out of reach of every text, under their ids (SentencePiece's control symbols)."""
    if not hidden:
        return dict(state)
    model, vocabulary = state["model"], state["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = [[f"{_MARK}{n}" if n in hidden else piece, score] for n, (piece, score) in enumerate(vocabulary)]
    added = [entry for entry in state["added_tokens"] if entry["id"] not in hidden]
    return {**state, "model": {**model, "vocab": vocabulary}, "added_tokens": added}


def _without_prefix(rule: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Take out every rule that puts a space before a text, for text that continues another."""
    if rule is None or rule["type"] == "Prepend":
        return None
    for members in ("normalizers", "pretokenizers"):
        if members in rule:
            return {**rule, members: [kept for rule in rule[members] if (kept := _without_prefix(rule)) is not None]}
    return {**rule, **_PREFIX_OFF.get(rule["type"], {})}
