"""The dense model: a run folder or a checkpoint of ours, or a Hugging Face folder. Nothing of its weights is held."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megavlm.checkpoint import RunFolder, find_checkpoint
from megavlm.checkpoint.folder import RELEASE
from megavlm.checkpoint.release import ReleaseTensor
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.config import ConfigT, load_recipe, save_recipe
from megavlm.convert.from_hf import open_folder
from megavlm.convert.incoming import Incoming
from megavlm.convert.own_checkpoint import small_files, tokenizer_of_copy
from megavlm.convert.parts import EMBEDDING, MODEL_NAME, RECIPE_NAME, ModelFile, ModelParts, check_weights
from megavlm.convert.read_hf import CONFIG_NAME
from megavlm.models.language import LanguageConfig
from megavlm.recipe import Recipe

MOE_OVERRIDE = "model.language.moe."
_REMEDY = "Its recipe or the overrides are not of these weights: check them."


@dataclass(frozen=True)
class DenseModel:
    """What is upcycled."""

    source: Path
    model: ModelFile
    """Its parts; the tokenizer's path is where it will be in the target, if it is copied."""
    recipe: Recipe | None
    """Of the run that trained it."""
    tensors: Mapping[str, ReleaseTensor]
    """Checkpoint key -> what it holds."""
    read: Callable[[str], Tensor]
    """Gives the full tensor of a key, without padding."""
    files: dict[str, bytes | Path]
    """Small files of the checkpoint to come: the tokenizer's, the published model's."""
    checkpoint: Path | None = None
    """Its folder, if it is ours."""
    incoming: Incoming | None = None
    """Its weights, if it is Hugging Face's."""

    @property
    def language(self) -> LanguageConfig:
        """The language model."""
        assert self.model.model.language is not None
        return self.model.model.language

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.tensors[EMBEDDING].shape[0]


def open_dense(source: Path, target: Path, overrides: Sequence[str] = (), *, keeps_step: bool = False) -> DenseModel:
    """Read what a folder says of itself, and check that its weights are what it says.

    Args:
        source: a folder with ``config.json`` is Hugging Face's; any other must hold a checkpoint.
        target: the run folder to come.
        overrides: changes to the checkpoint's recipe, or to what ``config.json`` says.
        keeps_step: the checkpoint to come has the dense one's name; else it is ``release``.

    Raises:
        ValueError: there is no model, it is damaged, has no language model, or has experts already.
    """
    if (source / CONFIG_NAME).exists():
        model, incoming, files = open_folder(source, target, overrides=overrides)
        files.pop(MODEL_NAME)
        dense = DenseModel(source, model, None, incoming.tensors, incoming.read, files, incoming=incoming)
    else:
        dense = _open_checkpoint(source, target, overrides, keeps_step=keeps_step)
    language = dense.model.model.language
    if language is None:
        raise ValueError(
            f"source={source}: holds {', '.join(dense.model.model.names)} and no language model, whose feed-forward "
            "layers become experts. Choose another."
        )
    if language.moe is not None:
        raise ValueError(
            f"source={source}: has {language.moe.num_moe_experts} experts in {len(language.layers_with_experts)} "
            "layers already. Only dense models are upcycled."
        )
    return dense


def with_experts(config: ConfigT, moe: Mapping[str, Any], overrides: Sequence[str]) -> ConfigT:
    """Return a recipe or a model file with ``model.language.moe``.

    Args:
        config: a :class:`Recipe` or a :class:`ModelFile`.
        moe: fields of it.
        overrides: ``model.language.moe.field=value``.

    Raises:
        ValueError: they do not fit together.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_NAME
        save_recipe(config, path)
        changes = [f"{MOE_OVERRIDE}{name}={value}" for name, value in moe.items() if value is not None]
        return load_recipe(path, [*changes, *overrides], type(config))


def _open_checkpoint(source: Path, target: Path, overrides: Sequence[str], *, keeps_step: bool) -> DenseModel:
    checkpoint = find_checkpoint(RunFolder(source))
    if checkpoint is None:
        raise ValueError(f"source={source}: holds neither a {CONFIG_NAME} nor a checkpoint. Check the path.")
    model, recipe = _read_model(checkpoint, overrides)
    copy = target / (checkpoint.name if keeps_step else RELEASE)
    moved = tokenizer_of_copy(model.tokenizer, checkpoint, copy)
    if moved is not model.tokenizer:
        model = model.model_copy(update={"tokenizer": moved})
        recipe = None if recipe is None else recipe.model_copy(update={"tokenizer": moved})
    weights = CheckpointWeights(checkpoint)
    tensors = check_weights(weights, model.model, _REMEDY)
    files: dict[str, bytes | Path] = {**small_files(checkpoint)}
    return DenseModel(source, model, recipe, tensors, weights.__getitem__, files, checkpoint=checkpoint)


def _read_model(checkpoint: Path, overrides: Sequence[str]) -> tuple[ModelFile, Recipe | None]:
    """The parts that a checkpoint holds, and the recipe of the run, if there was one."""
    recipe = None
    if (checkpoint / RECIPE_NAME).is_file():
        recipe = load_recipe(checkpoint / RECIPE_NAME, overrides, Recipe)
        if not (checkpoint / MODEL_NAME).is_file():
            return ModelFile(model=ModelParts.of(recipe.model), tokenizer=recipe.tokenizer), recipe
        overrides = [text for text in overrides if text.startswith(("model.", "tokenizer."))]
    return load_recipe(checkpoint / MODEL_NAME, overrides, ModelFile), recipe
