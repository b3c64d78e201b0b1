"""The tokenizers: text to token ids and back. One file per kind, and the dict of kinds."""

from pathlib import Path
from typing import Annotated, Protocol

import pydantic

from megavlm.config import Config
from megavlm.data.tokenizers.huggingface import HuggingFaceTokenizer, HuggingFaceTokenizerConfig
from megavlm.data.tokenizers.sentencepiece import SentencePieceTokenizer, SentencePieceTokenizerConfig


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, the image token included."""

    @property
    def pad_id(self) -> int:
        """The token that fills rows; the end-of-text token where the vocabulary has no padding token."""

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text; ``None`` where the vocabulary has none."""

    @property
    def image_token_id(self) -> int:
        """The token that stands where an image feature goes. No text ever encodes to it."""

    def encode(self, text: str, *, starts_text: bool = False) -> list[int]:
        """Encode plain text, adding nothing.

        The spelling of a special token inside ``text`` is encoded as ordinary characters, so that nobody's data can
        end a turn or open an image.

        Args:
            text: what to encode.
            starts_text: whether nothing but a begin-of-text token stands before it. Tokenizers that put a space before
                the first word do so only then.
        """

    def special_id(self, text: str) -> int | None:
        """Return the id of a special symbol such as ``<|im_start|>``; ``None`` where it is none of the vocabulary's."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, its spaces kept; special tokens and ids beyond the vocabulary give no text."""

    def save(self, folder: Path) -> None:
        """Write into ``folder`` what the same config with that folder as its path needs."""


class TokenizerKind(Protocol):
    """What the config class of each kind offers."""

    kind: str

    def build(self) -> Tokenizer:
        """Load the tokenizer; ``ValueError`` where its files are missing or damaged."""


TOKENIZERS: dict[str, type[Config]] = {
    "sentencepiece": SentencePieceTokenizerConfig,
    "huggingface": HuggingFaceTokenizerConfig,
}

TokenizerConfig = Annotated[
    SentencePieceTokenizerConfig | HuggingFaceTokenizerConfig, pydantic.Field(discriminator="kind")
]

__all__ = [
    "TOKENIZERS",
    "HuggingFaceTokenizer",
    "HuggingFaceTokenizerConfig",
    "SentencePieceTokenizer",
    "SentencePieceTokenizerConfig",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerKind",
]
