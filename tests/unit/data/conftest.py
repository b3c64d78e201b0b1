"""Tokenizers, images and data files that the tests of the data package share."""

import io
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy
import pytest
import sentencepiece
import tokenizers
import transformers
from PIL import Image
from small_data import BYTE_SPECIALS, TILE_SIZE, TOKENS_PER_TILE

from megavlm.data import DataConfig, SampleProcessor, Tokenizer
from megavlm.data.tokenizers import HuggingFaceTokenizerConfig, SentencePieceTokenizerConfig


def _byte_letters() -> list[str]:
    """The letter by which byte-level tokenizers write each byte 0..255 (the table of GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in shown]
    letters = {value: chr(value) for value in shown} | {value: chr(256 + n) for n, value in enumerate(hidden)}
    return [letters[value] for value in range(256)]


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = BYTE_SPECIALS | {letter: 4 + value for value, letter in enumerate(_byte_letters())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return _save(backend, tmp_path_factory.mktemp("byte_tokenizer"))


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with merges."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(BYTE_SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sentences(), trainer)
    return _save(backend, tmp_path_factory.mktemp("bpe_tokenizer"))


def _save(backend: tokenizers.Tokenizer, folder: Path) -> Path:
    full = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    full.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as LLaMA's: BPE, spaces and line breaks kept, bytes as fallback; chat symbols that text cannot reach."""
    return _train_sentencepiece(tmp_path_factory, control_symbols=["<|im_start|>", "<|im_end|>"])


@pytest.fixture(scope="session")
def reachable_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat symbols and image token are ordinary entries that any text can reach."""
    return _train_sentencepiece(tmp_path_factory, user_defined_symbols=["<|im_start|>", "<|im_end|>", "<image>"])


@pytest.fixture(scope="session")
def normalising_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that makes plain letters of full-width ones before it looks for its chat symbols."""
    symbols = ["<|im_start|>", "<|im_end|>"]
    return _train_sentencepiece(tmp_path_factory, user_defined_symbols=symbols, normalization_rule_name="nmt_nfkc")


def _train_sentencepiece(tmp_path_factory: pytest.TempPathFactory, **settings: object) -> Path:
    model = io.BytesIO()
    defaults = {
        "vocab_size": 450,
        "model_type": "bpe",
        "byte_fallback": True,
        "hard_vocab_limit": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences()), model_writer=model, **defaults | settings
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tiny.model"
    path.write_bytes(model.getvalue())
    return path


def _sentences() -> list[str]:
    words = ["the", "a", "cat", "dog", "image", "shows", "red", "blue", "what", "is", "in", "hello", "world"]
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=8)) for _ in range(300)] + ["<tile_1> <tile_global_thumbnail> </Image>"] * 9


@pytest.fixture(scope="session")
def byte_tokenizer(byte_folder: Path) -> Tokenizer:
    return HuggingFaceTokenizerConfig(path=byte_folder).build()


@pytest.fixture(scope="session", params=["byte", "bpe", "sentencepiece", "reachable"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each tokenizer of the tests in turn."""
    if request.param in ("byte", "bpe"):
        return HuggingFaceTokenizerConfig(path=request.getfixturevalue(f"{request.param}_folder")).build()
    return SentencePieceTokenizerConfig(path=request.getfixturevalue(f"{request.param}_file")).build()


@pytest.fixture
def write_image(tmp_path: Path) -> Callable[..., Path]:
    """Write a picture of noise into the test's folder."""

    def write(name: str, width: int, height: int, mode: str = "RGB") -> Path:
        channels = {"RGB": 3, "RGBA": 4, "L": 1, "CMYK": 4}[mode]
        values = numpy.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, channels), "uint8")
        Image.fromarray(values.squeeze(), mode=mode).save(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[Iterable[object]], Path]:
    """Write rows as ``rows.jsonl``; texts are written as they are."""

    def write(rows: Iterable[object], name: str = "rows.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def make_processor(byte_tokenizer: Tokenizer) -> Callable[..., SampleProcessor]:
    """A processor with 8-pixel tiles of 2 tokens; settings of :class:`DataConfig` by name."""

    def make(tokenizer: Tokenizer = byte_tokenizer, tokens_per_tile: int = TOKENS_PER_TILE, **settings: object):
        config = DataConfig.model_validate(
            {"train": {"kind": "jsonl", "path": "unused"}, "seq_length": 4096} | settings
        )
        return SampleProcessor(config, tokenizer, TILE_SIZE, tokens_per_tile)

    return make
