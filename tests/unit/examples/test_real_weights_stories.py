"""A llama2.c file becomes the Hugging Face folder that it was made of, with SentencePiece's vocabulary."""

import importlib
import io
import json
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[3] / "examples" / "real_weights"

sys.path.insert(0, str(FOLDER))  # as Python does where the script is run
stories = importlib.import_module("stories")
sys.path.remove(str(FOLDER))

HEADS, GROUPS, WIDTH, FFN, LAYERS, LENGTH = 4, 2, 32, 48, 2, 16
WORDS = [" ", "a", "b", "c", "ab", " a", " ab", "abc", "bc"]
SCORES = {"ab": -1.0, " a": -2.0, " ab": -3.0, "abc": -5.0, "bc": -4.0}
PIECES = ["<unk>", "\n<s>\n", "\n</s>\n", *map(chr, range(256)), *WORDS]
ORDER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=len(PIECES),
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def exported(model: LlamaForCausalLM, vocab_size: int = len(PIECES)) -> bytes:
    """As llama2.c's first exporter writes it: channels that rotate together are neighbours."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    data = struct.pack("<7i", WIDTH, FFN, LAYERS, HEADS, GROUPS, vocab_size, LENGTH)
    data += state["model.embed_tokens.weight"].tobytes()
    for name in ORDER:
        for number in range(LAYERS):
            values = state[f"model.layers.{number}.{name}.weight"]
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": GROUPS}.get(name)
            if heads:
                values = values.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(values.shape)
            data += np.ascontiguousarray(values).tobytes()
    data += state["model.norm.weight"].tobytes()
    return data + bytes(4 * LENGTH * (WIDTH // HEADS))


def vocabulary(pieces: list[str]) -> bytes:
    data = struct.pack("<i", max(map(len, pieces)))
    for piece in pieces:
        text = piece.encode()
        data += struct.pack("<fi", SCORES.get(piece, -100.0), len(text)) + text
    return data


def tarball(path: Path, data: bytes, name: str = stories.MEMBER) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return path


def test_a_file_becomes_the_folder_that_it_was_made_of(tmp_path: Path) -> None:
    model = make_llama()
    stories.write_stories15m(tarball(tmp_path / "a.tgz", exported(model) + vocabulary(PIECES)), tmp_path / "hf")
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["tie_word_embeddings"]) == (1e-5, 10000.0, True)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    # "ab" is put together before " a" and "bc", of which nothing is left for "abc"'s halves but "ab" and "c"
    assert tokenizer.tokenize("ab abc") == ["\u2581ab", "\u2581ab", "c"]
    assert tokenizer.tokenize("\u00e9") == ["\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab \u00e9 abc")) == "ab \u00e9 abc"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("<s>"))[-1:] == ["<s>"]
    # begin of text stands between stories, so it ends them
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 1, 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:1000], r"is no llama2\.c model with its vocabulary \(.*buffer"),
        (lambda data: data[:-1], r"is no llama2\.c model with its vocabulary \("),
        (lambda data: data[:20], r"is no llama2\.c model with its vocabulary \(.*28 bytes"),
        (lambda _: exported(make_llama(), vocab_size=-len(PIECES)), r"its header says Shape\(.*vocab_size=-268"),
        (lambda _: exported(make_llama()) + vocabulary([*PIECES[:-1], "ab"]), r"1 of 268 pieces occur twice"),
    ],
    ids=["weights", "pieces", "header", "untied", "twice"],
)
def test_another_file_is_refused(spoil: object, message: str, tmp_path: Path) -> None:
    data = spoil(exported(make_llama()) + vocabulary(PIECES))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        stories.write_stories15m(tarball(tmp_path / "a.tgz", data), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_tarball_without_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tgz: has no package/dist/llama2\.data .*Delete it"):
        stories.write_stories15m(tarball(tmp_path / "a.tgz", b"", "package/other"), tmp_path / "hf")
    (tmp_path / "b.tgz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"(?s)b\.tgz: has no package/dist/llama2\.data .*Delete it"):
        stories.write_stories15m(tmp_path / "b.tgz", tmp_path / "hf")
