"""From a checkpoint of ours to a Hugging Face folder, one tensor at a time."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint import RunFolder, durable, find_checkpoint
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.convert import own_layout
from megavlm.convert.carried import CompletedWeights
from megavlm.convert.config_of import architecture_of, published_config
from megavlm.convert.families import FAMILIES
from megavlm.convert.from_hf import PUBLISHED
from megavlm.convert.lora import MergedWeights
from megavlm.convert.parts import EMBEDDING, RECIPE_NAME, ModelFile, ModelParts, check_weights, read_model
from megavlm.convert.processor import PROCESSOR_FILES, stop_token_ids, write_processor
from megavlm.convert.read_hf import CONFIG_NAME, read_json
from megavlm.convert.staging import progress_bar, staged
from megavlm.convert.write_hf import ShardWriter
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER

GENERATION_NAME = "generation_config.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CARRIED = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "image_token_id")
_PART_CONFIGS = ("text_config", "llm_config")


def export_folder(
    source: Path,
    target: Path,
    overrides: Sequence[str] = (),
    *,
    part: str | None = None,
    architecture: str | None = None,
    max_shard_bytes: int = 2 * 10**9,
    dtype: str | None = None,
) -> Path:
    """Write a Hugging Face folder from a run folder or a checkpoint.

    Args:
        source: a run folder, of which the newest checkpoint is taken, or the folder of one checkpoint.
        target: the folder to write; must not exist.
        overrides: changes to the checkpoint's recipe (``tokenizer.path=...``).
        part: ``language`` or ``vision`` of a whole model; None: all that the checkpoint holds.
        architecture: the class to write for; None: the best (:func:`architecture_of`).
        max_shard_bytes: most bytes of tensors in a file.
        dtype: a key of :data:`DTYPES`; None: as saved.

    Returns:
        ``target``.

    Raises:
        ValueError: the checkpoint is damaged or does not hold what its recipe says, or ``transformers`` has no class
            for the model; nothing is left behind.
    """
    checkpoint = find_checkpoint(RunFolder(source))
    if checkpoint is None:
        raise ValueError(f"source={source}: holds neither a {CONFIG_NAME} nor a checkpoint. Check the path.")
    model, recipe = read_model(checkpoint, overrides)
    parts = _chosen(model.model, part)
    architecture = architecture_of(parts, architecture)
    weights = CheckpointWeights(checkpoint)
    if parts.language is not None and parts.language.lora is not None:
        weights = MergedWeights(checkpoint, parts.language)
        parts = parts.model_copy(update={"language": parts.language.model_copy(update={"lora": None})})
    vocab_size = weights.template(EMBEDDING).shape[0] if EMBEDDING in weights else None
    remedy = f"The model part of {RECIPE_NAME} or the overrides are not of these weights: check them."
    keys = list(check_weights(weights, parts, remedy))
    completed = CompletedWeights(weights, keys, parts, FAMILIES[architecture].weight_map)
    values = _carried(checkpoint, model, None if recipe is None else recipe.data.seq_length)
    config = published_config(completed.parts, vocab_size, values, architecture, extra=completed.extra)
    found = [weights.template(key).dtype for key in keys]
    saved = max(set(found), key=found.count)
    config["torch_dtype"] = str(DTYPES[dtype] if dtype else saved).removeprefix("torch.")
    with staged(target) as folder:
        _write_weights(folder, completed, max_shard_bytes, DTYPES[dtype] if dtype else None)
        _write_json(folder / CONFIG_NAME, config)
        if architecture == own_layout.ARCHITECTURE:
            for name in own_layout.MODEL_CODE:
                durable.copy_file(own_layout.CODE_FOLDER / name, folder / name)
        if parts.language is not None:
            _write_json(folder / GENERATION_NAME, _generation(checkpoint, config))
            _write_tokenizer(folder, checkpoint, model)
        _write_processor(folder, checkpoint, model, recipe, parts, architecture)
    LOGGER.info("%s: %s, %d tensors of %s", target, architecture, len(completed.keys), checkpoint)
    return target


def _chosen(parts: ModelParts, part: str | None) -> ModelParts:
    if part is None:
        return parts
    if part not in parts.names:
        raise ValueError(f"--part={part}: the checkpoint holds {', '.join(parts.names)}. Choose one of them.")
    if part == "language" and "cross_attention" in parts.weight_parts:
        model = parts.whole()
        LOGGER.warning(
            "--part=language: leaves the cross-attention of %d layers out (model.fusion.kind=%s): what is written "
            "%s, and never sees an image",
            len(model.cross_attention_layers),
            model.fusion.kind,
            "answers texts as the model does"
            if model.gated_feed_forward is None
            else "lacks the gated feed-forward layers (model.fusion.feed_forward) that texts go through too",
        )
    return parts.only(part)


def _write_weights(folder: Path, weights: CompletedWeights, max_shard_bytes: int, dtype: torch.dtype | None) -> None:
    def split(key: str, tensor: Tensor) -> dict[str, Tensor]:
        rule, names = weights.table.find(key)
        return dict(zip(names, rule.layout.split(tensor if dtype is None else tensor.to(dtype)), strict=True))

    groups = [split(key, weights.template(key)) for key in weights.keys]
    with progress_bar() as progress, ShardWriter(folder, groups, max_shard_bytes) as writer:
        for key in progress.track(weights.keys, description=f"writing {folder.name.split('.writing-')[0]}"):
            for name, tensor in split(key, weights[key]).items():
                writer.write(name, tensor)


def _carried(checkpoint: Path, model: ModelFile, seq_length: int | None) -> dict[str, Any]:
    """What transformers wants to know and a recipe does not say: from the model that came in, or the tokenizer."""
    original = checkpoint / PUBLISHED / CONFIG_NAME
    if original.is_file():
        outer = read_json(original)
        inner = next((outer[name] for name in _PART_CONFIGS if name in outer), outer)
        values = {name: inner.get(name, outer.get(name)) for name in _CARRIED}
        values["image_token_id"] = values["image_token_id"] or outer.get("image_token_index")  # LLaVA's name
        if values["image_token_id"] is None and model.model.is_whole and (checkpoint / "tokenizer").is_dir():
            values["image_token_id"] = _own_tokenizer(checkpoint, model).build().image_token_id
        return values
    carried: dict[str, Any] = dict.fromkeys(_CARRIED) | {"max_position_embeddings": seq_length}
    if model.tokenizer is not None:
        tokenizer = _own_tokenizer(checkpoint, model).build()
        carried |= {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
            "image_token_id": tokenizer.image_token_id,
        }
    return carried


def _own_tokenizer(checkpoint: Path, model: ModelFile) -> Any:
    """The tokenizer's config; the checkpoint's copy of the files goes before the recipe's path."""
    assert model.tokenizer is not None
    saved = checkpoint / "tokenizer"
    return model.tokenizer.model_copy(update={"path": saved}) if saved.is_dir() else model.tokenizer


def _generation(checkpoint: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    original = checkpoint / PUBLISHED / GENERATION_NAME
    if original.is_file():
        return read_json(original)
    text = config.get("text_config", config)
    return {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in text}


def _write_tokenizer(folder: Path, checkpoint: Path, model: ModelFile) -> None:
    saved = checkpoint / "tokenizer"
    if saved.is_dir():
        for file in sorted(saved.iterdir()):
            durable.copy_file(file, folder / file.name)
    elif model.tokenizer is not None and model.tokenizer.kind == "huggingface":
        model.tokenizer.build().save(folder)
    else:
        LOGGER.info("%s holds no tokenizer: none is written", checkpoint)


def _write_processor(
    folder: Path, checkpoint: Path, model: ModelFile, recipe: Recipe | None, parts: ModelParts, architecture: str
) -> None:
    """What makes inputs of questions: as the run did, or, where nothing was trained, as the original model does."""
    if recipe is not None:
        config = _own_tokenizer(checkpoint, model)
        if not config.path.exists():
            LOGGER.warning("tokenizer.path=%s: is not there, so no processor files are written", config.path)
            return
        tokenizer = config.build()
        write_processor(folder, recipe, tokenizer, parts.names, architecture)
        if parts.language is not None:
            path = folder / GENERATION_NAME
            ends = stop_token_ids(recipe, tokenizer)
            durable.replace_file(path, _json(read_json(path) | {"eos_token_id": ends}))
        return
    carried = [name for name in PROCESSOR_FILES if (checkpoint / PUBLISHED / name).is_file()]
    for name in carried if parts.vision is not None else ():
        durable.copy_file(checkpoint / PUBLISHED / name, folder / name)
    if parts.vision is not None:
        LOGGER.info("%s: processor files of the original model: %s", folder.name, ", ".join(carried) or "none")


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    durable.write_file(path, _json(tree))


def _json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()
