"""A SentencePiece ``.model`` file as a tokenizer."""

from pathlib import Path
from typing import Literal

import sentencepiece

from megavlm.config import Config
from megavlm.data.tokenizers.plain_text import PlainTextGuard, looks_special

MODEL_NAME = "tokenizer.model"

# Two serialised protobuf messages, one behind the other, read as their merge. This one says:
# normalizer_spec (field 3) { add_dummy_prefix (field 3): false, remove_extra_whitespaces (field 4): false }.
_KEEP_SPACES = bytes([0x1A, 4, 0x18, 0, 0x20, 0])


class SentencePieceTokenizerConfig(Config):
    """A SentencePiece model file."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    path: Path
    """The ``.model`` file, or a folder that holds it as ``tokenizer.model``."""
    image_token: str = "<image>"
    """The symbol of image positions; added behind the vocabulary where the model has no such piece."""

    def build(self) -> "SentencePieceTokenizer":
        """Load the model file."""
        return SentencePieceTokenizer(self)


class SentencePieceTokenizer:
    """Tokenizer over a SentencePiece model.

    The space that SentencePiece puts before a text ("dummy prefix") stands only before a text's first word, never in
    its middle, and spaces at the edge of a piece of text are kept: joining the pieces gives the text.
    """

    def __init__(self, config: SentencePieceTokenizerConfig) -> None:
        """Load the model.

        Raises:
            ValueError: the file is missing or damaged, or has no end-of-text piece.
        """
        path = config.path / MODEL_NAME if config.path.is_dir() else config.path
        self._path = path
        try:
            self._model_bytes = path.read_bytes()
        except OSError as error:
            raise ValueError(f"tokenizer.path={path}: cannot be read ({error.strerror}). Check the path.") from None
        self._load(config.image_token)

    def _load(self, image_token: str) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model_bytes)
            self._continuing = sentencepiece.SentencePieceProcessor(model_proto=self._model_bytes + _KEEP_SPACES)
        except RuntimeError:
            raise ValueError(
                f"tokenizer.path={self._path}: {len(self._model_bytes)} bytes that are no SentencePiece model. "
                "Copy the file again."
            ) from None
        if self._processor.eos_id() < 0:
            raise ValueError(
                f"tokenizer.path={self._path}: the model has no end-of-text piece (eos_id=-1). Train it with one."
            )
        pieces = [self._processor.id_to_piece(index) for index in range(self._processor.vocab_size())]
        self._pieces = {piece: index for index, piece in enumerate(pieces)}
        self._image_token = image_token
        self._image_token_id = self._pieces.get(image_token, len(pieces))
        self._special = {
            piece: index
            for piece, index in self._pieces.items()
            if self._processor.is_control(index) or looks_special(piece)
        }
        self._special[image_token] = self._image_token_id
        self._guard = PlainTextGuard(self._special)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as file content, so that a loader's worker needs no file."""
        return (_restore, (self._path, self._model_bytes, self._image_token))

    @property
    def vocab_size(self) -> int:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        return max(len(self._pieces), self._image_token_id + 1)

    @property
    def pad_id(self) -> int:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        return self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id

    @property
    def eos_id(self) -> int:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        return self._processor.eos_id()

    @property
    def bos_id(self) -> int | None:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        return self._processor.bos_id() if self._processor.bos_id() >= 0 else None

    @property
    def image_token_id(self) -> int:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        return self._image_token_id

    def encode(self, text: str, *, starts_text: bool = False) -> list[int]:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        first = self._processor if starts_text else self._continuing
        return self._guard.encode(text, first.encode, self._continuing.encode)

    def special_id(self, text: str) -> int | None:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        return self._special.get(text)

    def decode(self, ids: list[int]) -> str:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        special = set(self._special.values())
        known = len(self._pieces)  # a model's output may be wider than the vocabulary
        return str(self._continuing.decode([index for index in ids if index not in special and index < known]))

    def save(self, folder: Path) -> None:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_NAME).write_bytes(self._model_bytes)


def _restore(path: Path, model_bytes: bytes, image_token: str) -> SentencePieceTokenizer:
    tokenizer = SentencePieceTokenizer.__new__(SentencePieceTokenizer)
    tokenizer._path = path
    tokenizer._model_bytes = model_bytes
    tokenizer._load(image_token)
    return tokenizer
