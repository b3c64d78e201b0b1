"""LoRA out and in: merged into dense weights, or as an adapter folder of ``peft``.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, with the names of LlamaForCausalLM and
Qwen2ForCausalLM. Shape letters: I and O width of a projection in and out, R rank.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megavlm.checkpoint import RunFolder, find_checkpoint
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.convert.parts import read_model
from megavlm.convert.read_hf import read_json
from megavlm.convert.staging import staged
from megavlm.engines import MegatronEngineConfig
from megavlm.models.language import LanguageConfig
from megavlm.models.lora import ATTENTION_PROJECTIONS, PROJECTIONS, FusedRows, LoraConfig
from megavlm.runtime.log import LOGGER

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LEAVES = {"a": "lora_A", "b": "lora_B"}
_LAYER_OF = {name: layer for layer, names in PROJECTIONS.items() for name in names}
_OUR_WEIGHT = re.compile(r"language\.decoder\.layers\.(\d+)\.(?:self_attention|mlp)\.(linear_\w+)\.weight")
_UNSUPPORTED = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": None,
    "alpha_pattern": None,
}
"""Settings of peft that change the function and have no counterpart here, and what they must be, or empty."""


def lora_key(layer: int, projection: str, leaf: str) -> str:
    """Return the checkpoint key of a projection's A (``a``) or B (``b``)."""
    block = "self_attention" if projection in ATTENTION_PROJECTIONS else "mlp"
    return f"language.decoder.layers.{layer}.{block}.{_LAYER_OF[projection]}.lora.{projection}.{leaf}"


def peft_name(layer: int, projection: str, leaf: str) -> str:
    """Return the name that peft has for it, in the adapter of a LlamaForCausalLM or Qwen2ForCausalLM."""
    block = "self_attn" if projection in ATTENTION_PROJECTIONS else "mlp"
    return f"base_model.model.model.layers.{layer}.{block}.{projection}.{_LEAVES[leaf]}.weight"


def lora_shapes(config: LanguageConfig) -> dict[tuple[int, str, str], tuple[int, int]]:
    """Return (layer, projection, leaf) -> full shape, of every A ``[R, I]`` and B ``[O, R]`` of a decoder."""
    assert config.lora is not None
    heads, groups = config.query_width, config.key_width
    width, inner = config.hidden_size, config.ffn_hidden_size
    sizes = {
        "q_proj": (width, heads),
        "k_proj": (width, groups),
        "v_proj": (width, groups),
        "o_proj": (heads, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }
    shapes = {}
    for layer in range(config.num_layers):
        for projection, (input_size, output_size) in sizes.items():
            if config.lora.adapts(layer, projection):
                shapes[layer, projection, "a"] = (config.lora.r, input_size)
                shapes[layer, projection, "b"] = (output_size, config.lora.r)
    return shapes


class MergedWeights(CheckpointWeights):
    """The weights of a checkpoint with LoRA, as those of a dense model that computes the same, to rounding."""

    def __init__(self, folder: Path, config: LanguageConfig) -> None:
        """Verify a checkpoint, and compare its adapters with the model's.

        Args:
            folder: of the checkpoint.
            config: of its language model, LoRA included.

        Raises:
            ValueError: it is damaged, not to be trusted, or holds other adapters.
        """
        super().__init__(folder)
        assert config.lora is not None
        self._scale = config.lora.scale
        self._config = config.model_copy(update={"lora": None}).transformer_config(
            MegatronEngineConfig().megatron_settings()
        )
        wanted = {lora_key(*place): shape for place, shape in lora_shapes(config).items()}
        found = {key: tuple(self.template(key).shape) for key in self._entries if ".lora." in key}
        _compare(wanted, found, f"{folder}", "model.language.lora of its recipe or the overrides")
        self._adapters = frozenset(found)

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._entries if key not in self._adapters)

    def __len__(self) -> int:
        return len(self._entries) - len(self._adapters)

    def __getitem__(self, key: str) -> Tensor:
        """Read a full tensor, LoRA added.

        Raises:
            KeyError: the checkpoint has none of that key.
            ValueError: a file cannot be read.
        """
        weight = super().__getitem__(key)
        match = _OUR_WEIGHT.fullmatch(key)
        if match is None:
            return weight
        layer, linear = int(match[1]), match[2]
        products = {}
        for projection in PROJECTIONS.get(linear, ()):
            if lora_key(layer, projection, "a") in self._adapters:
                a, b = (super(MergedWeights, self).__getitem__(lora_key(layer, projection, leaf)) for leaf in "ab")
                products[projection] = (b.float() @ a.float() * self._scale).T
        if not products:
            return weight
        added = FusedRows.of(linear, self._config, weight.shape[0]).fuse(products).T
        return (weight.float() + added).to(weight.dtype)


def export_adapter(source: Path, target: Path, *, base_model: str | None = None) -> Path:
    """Write the LoRA of a run as a folder that ``peft`` loads.

    Args:
        source: a run folder, of which the newest checkpoint is taken, or the folder of one checkpoint.
        target: the folder to write; must not exist.
        base_model: path or name of the dense language model, for ``base_model_name_or_path``.

    Returns:
        ``target``.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or it has no LoRA or another than its recipe says.
    """
    checkpoint = find_checkpoint(RunFolder(source))
    if checkpoint is None:
        raise ValueError(f"source={source}: holds no checkpoint. Check the path.")
    language = read_model(checkpoint)[0].model.language
    if language is None or language.lora is None:
        raise ValueError(f"source={source}: its model has no LoRA (model.language.lora). Export it as a whole.")
    weights = CheckpointWeights(checkpoint)
    shapes = lora_shapes(language)
    found = {key: tuple(weights.template(key).shape) for key in weights if ".lora." in key}
    _compare({lora_key(*place): shape for place, shape in shapes.items()}, found, f"{checkpoint}", "its recipe")
    with staged(target) as folder:
        tensors = {peft_name(*place): weights[lora_key(*place)].contiguous() for place in shapes}
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(adapter_config(language.lora, base_model), indent=2, sort_keys=True)
        (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    LOGGER.info("%s: LoRA of %d projections, of %s", target, len(shapes) // 2, checkpoint)
    return target


def adapter_config(lora: LoraConfig, base_model: str | None) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": sorted(lora.target_modules),
        "layers_to_transform": lora.layers_to_transform,
        "inference_mode": True,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def read_adapter(folder: Path, config: LanguageConfig) -> dict[str, Tensor]:
    """Read an adapter folder of ``peft``.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        config: of the language model that it is for, with the same LoRA.

    Returns:
        Full tensors by our checkpoint keys, for :func:`megavlm.models.weights.fill_weights` of the part ``lora``.

    Raises:
        ValueError: a file is missing or damaged, or the adapter is of another kind, of other settings or for another
            model.
    """
    if config.lora is None:
        raise ValueError(f"{folder}: is LoRA, and the model has none. Give model.language.lora.")
    settings = read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type={settings.get('peft_type')!r} is not LORA. Only LoRA can be read.")
    for name, plain in _UNSUPPORTED.items():
        if settings.get(name) not in (plain, None, [], {}):
            raise ValueError(f"{folder}: {name}={settings[name]!r} has no counterpart here (only {plain!r}).")
    ours = adapter_config(config.lora, None)
    for name in ("r", "lora_alpha"):
        if settings.get(name) != ours[name]:
            raise ValueError(
                f"{folder}: {name}={settings.get(name)}, and model.language.lora.{name}={ours[name]}. Set it to the "
                "adapter's."
            )
    path = folder / ADAPTER_WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {error}. Take the folder anew.") from error
    shapes = lora_shapes(config)
    wanted = {peft_name(*place): shape for place, shape in shapes.items()}
    _compare(wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, f"{path}", "model.language")
    infinite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if infinite:
        raise ValueError(f"{path}: {infinite[0]} holds numbers that are not finite. Take the folder anew.")
    return {lora_key(*place): tensors[peft_name(*place)] for place in shapes}


def _compare(wanted: dict[str, tuple[int, int]], found: dict[str, tuple[int, ...]], where: str, check: str) -> None:
    """Compare the tensors of an adapter with a model's.

    Raises:
        ValueError: one is missing, is left over or has another shape.
    """
    for key, shape in wanted.items():
        if key not in found:
            numbers = f"{len(wanted)} tensors wanted, {len(found)} found"
            raise ValueError(f"{where}: lacks {key} of LoRA ({numbers}). Check {check}.")
        if found[key] != shape:
            raise ValueError(f"{where}: {key} has shape {found[key]}, and the model's has {shape}. Check {check}.")
    if extra := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"{where}: {len(extra)} tensors are not in the model's LoRA, first {extra[0]}. Check {check}.")
