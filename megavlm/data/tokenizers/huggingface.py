"""A local Hugging Face tokenizer folder as a tokenizer."""

import json
from pathlib import Path
from typing import Any, Literal

import tokenizers
import transformers

from megavlm.config import Config
from megavlm.data.tokenizers.plain_text import PlainTextGuard, looks_special

_FILE = "tokenizer.json"


class HuggingFaceTokenizerConfig(Config):
    """A folder with the tokenizer files of a Hugging Face model. Nothing is downloaded and no code of it is run."""

    kind: Literal["huggingface"] = "huggingface"
    path: Path
    """The folder (``tokenizer.json``, ``tokenizer_config.json``)."""
    image_token: str = "<image>"
    """The symbol of image positions; added behind the vocabulary where the tokenizer has no such token."""

    def build(self) -> "HuggingFaceTokenizer":
        """Load the folder."""
        return HuggingFaceTokenizer(self)


class HuggingFaceTokenizer:
    """Tokenizer over a fast Hugging Face tokenizer."""

    def __init__(self, config: HuggingFaceTokenizerConfig) -> None:
        """Load the tokenizer.

        Raises:
            ValueError: the folder or its files are missing or damaged, or no end-of-text token is named.
        """
        path = config.path
        if not path.is_dir():
            raise ValueError(f"tokenizer.path={path}: no such folder. Check the path.")
        _check_file(path / _FILE)
        try:
            full = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"tokenizer.path={path}: transformers cannot load it ({type(error).__name__}: {error}). "
                f"The folder needs {_FILE} and tokenizer_config.json."
            ) from None
        if not full.is_fast:
            raise ValueError(f"tokenizer.path={path}: has no fast tokenizer. Save the folder with {_FILE} in it.")
        if full.eos_token_id is None:
            raise ValueError(
                f"tokenizer.path={path}: names no end-of-text token. Set eos_token in tokenizer_config.json."
            )
        if config.image_token not in full.get_vocab():
            full.add_tokens([tokenizers.AddedToken(config.image_token, special=True)], special_tokens=True)
        self._full = full
        vocabulary: dict[str, int] = full.get_vocab()
        self._image_token_id = vocabulary[config.image_token]
        self._vocab_size = max(vocabulary.values()) + 1
        named = set(full.all_special_ids)
        self._special = {token: index for token, index in vocabulary.items() if index in named or looks_special(token)}
        self._special |= {entry.content: index for index, entry in full.added_tokens_decoder.items() if entry.special}
        self._special[config.image_token] = self._image_token_id
        self._guard = PlainTextGuard(self._special)
        self._backend = _load_backend(full.backend_tokenizer.to_str())
        self._continuing = _load_backend(_without_prefix(full.backend_tokenizer.to_str()))

    @property
    def vocab_size(self) -> int:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        return self._vocab_size

    @property
    def pad_id(self) -> int:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        pad = self._full.pad_token_id
        return self.eos_id if pad is None else int(pad)

    @property
    def eos_id(self) -> int:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        return int(self._full.eos_token_id)

    @property
    def bos_id(self) -> int | None:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        bos = self._full.bos_token_id
        return None if bos is None else int(bos)

    @property
    def image_token_id(self) -> int:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        return self._image_token_id

    def encode(self, text: str, *, starts_text: bool = False) -> list[int]:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        return self._guard.encode(text, self._encode_first if starts_text else self._encode_rest, self._encode_rest)

    def _encode_first(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _encode_rest(self, text: str) -> list[int]:
        return self._continuing.encode(text, add_special_tokens=False).ids

    def special_id(self, text: str) -> int | None:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        return self._special.get(text)

    def decode(self, ids: list[int]) -> str:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        return str(self._full.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def save(self, folder: Path) -> None:
        """See :class:`megavlm.data.tokenizers.Tokenizer`."""
        self._full.save_pretrained(folder)


def _check_file(path: Path) -> None:
    """Find a damaged ``tokenizer.json`` before the library does, whose message would not name the file."""
    if not path.exists():
        return  # transformers can build it from other files
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer.path={path}: is damaged ({error}). Copy the file again.") from None
    missing = [key for key in ("added_tokens", "model") if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"tokenizer.path={path}: has no {' and no '.join(missing)}. Copy the file again.")


def _load_backend(serialised: str) -> tokenizers.Tokenizer:
    """A copy that neither cuts nor fills texts, whatever the folder's files ask for."""
    backend = tokenizers.Tokenizer.from_str(serialised)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _without_prefix(serialised: str) -> str:
    """Take out every rule that puts a space before a text, for text that continues another."""
    state = json.loads(serialised)
    state["normalizer"] = _strip_prefix_rule(state.get("normalizer"))
    state["pre_tokenizer"] = _strip_prefix_rule(state.get("pre_tokenizer"))
    return json.dumps(state, ensure_ascii=False)


def _strip_prefix_rule(rule: dict[str, Any] | None) -> dict[str, Any] | None:
    if rule is None or rule["type"] == "Prepend":
        return None
    if rule["type"] == "Metaspace":
        return rule | {"prepend_scheme": "never"}
    if rule["type"] == "ByteLevel":
        return rule | {"add_prefix_space": False}
    for members in ("normalizers", "pretokenizers"):
        if members in rule:
            kept = [stripped for member in rule[members] if (stripped := _strip_prefix_rule(member)) is not None]
            return rule | {members: kept}
    return rule
