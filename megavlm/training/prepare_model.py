"""The model of a run before its first step: built, filled, frozen, wrapped, with its optimizer."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from megavlm.build import Parts
from megavlm.checkpoint import RunFolder, find_to_resume, load_checkpoint, start_from
from megavlm.config import validate
from megavlm.data import Progress
from megavlm.models.config import VLMConfig
from megavlm.models.initialization import initialize_weights
from megavlm.models.part import PARTS
from megavlm.models.weights import count_parameters
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER
from megavlm.training.feeding import tell_other_order
from megavlm.training.freeze import freeze_except, scale_learning_rates, scale_weight_decay
from megavlm.training.position import Position
from megavlm.training.spikes import SpikeWatch


def prepare_model(
    parts: Parts, folder: RunFolder, spikes: SpikeWatch | None, data_order: Mapping[str, Any] | None
) -> tuple[Position, Progress]:
    """Build, fill, freeze and wrap the model; make the optimizer; load what there is to load; say where it stands."""
    recipe, engine = parts.recipe, parts.engine
    chunks = parts.build_chunks()
    # verified before anything of it is believed, its recipe too
    settings = recipe.checkpoint
    resume_from = find_to_resume(folder, verify=settings.verify, fall_back=settings.fall_back)
    if resume_from is None:
        initialize_weights(chunks, recipe.training.seed)
    _log_parameters(parts, chunks)
    make_trainable(parts, chunks)
    if resume_from is not None:
        _check_same_model(recipe, resume_from)
        loaded = load_checkpoint(resume_from, engine, with_optimizer=True, verify=False)
        LOGGER.info("resuming %s after step %d", folder.path, loaded.iteration)
        if spikes is not None:
            spikes.restore(loaded.extra.get("loss_spike"))
        tell_other_order(loaded.extra.get("data_order"), data_order)
        consumed_samples = loaded.extra["consumed_samples"]
        lanes = loaded.extra.get("data")
        progress = Progress.after(consumed_samples) if lanes is None else Progress.from_json(lanes)
        return Position(loaded.iteration, consumed_samples), progress
    if settings.pretrained_checkpoint:
        start_from(engine, settings.pretrained_checkpoint, recipe.training.trained, verify=settings.verify)
    return Position(), Progress.after(0)


def make_trainable(parts: Parts, chunks: list[torch.nn.Module]) -> None:
    """Freeze, scale and wrap a model as its recipe says, and make its optimizer. Collective.

    Args:
        parts: of the run.
        chunks: this rank's, with their weights.

    Raises:
        ValueError: a module of ``training.trainable_within`` is not there, or the engine cannot train the model.
    """
    recipe, engine = parts.recipe, parts.engine
    engine.loss.num_sources = len(recipe.data.train.source_names)
    found = freeze_except(chunks, recipe.training.trained)
    _check_modules_found(parts, found)
    scale_learning_rates(chunks, recipe.training.lr_scale)
    scale_weight_decay(chunks, recipe.training.weight_decay_scale)
    engine.wrap(chunks)
    engine.build_optimizer(recipe.training.optimizer)


def _check_modules_found(parts: Parts, found: Collection[str]) -> None:
    """Collective: each module of ``training.trainable_within`` is on some rank."""
    for part, modules in parts.recipe.training.trained.within.items():
        for module in modules:
            if not parts.engine.any_rank(f"{part}.{module}" in found):
                raise ValueError(
                    f"training.trainable_within.{part}={modules}: no parameter of {part} lies in {module!r}. Names are "
                    "those of the model's modules below the part, as `megavlm plan --modules` lists them."
                )


def _log_parameters(parts: Parts, chunks: list[torch.nn.Module]) -> None:
    """Say how many parameters each part has and which of them train."""
    counts = count_parameters(chunks)
    totals = parts.engine.sum_over_ranks([float(counts[name]) for name in PARTS])
    trained = parts.recipe.training.trained
    for name, total in zip(PARTS, totals, strict=True):
        if total:
            state = "trains" if name in trained.parts else "frozen"
            state += f", only {', '.join(trained.within[name])}" if name in trained.within else ""
            LOGGER.info("%-15s %15s parameters, %s", name, f"{total:,.0f}", state)


def _check_same_model(recipe: Recipe, checkpoint: Path) -> None:
    """A run is resumed with the model it was begun with.

    Raises:
        ValueError: the recipe describes another model than the checkpoint's.
    """
    saved = yaml.safe_load((checkpoint / "recipe.yaml").read_text(encoding="utf-8"))["model"]
    # read anew, so that fields that the model has gained since have their defaults
    before_by_name = validate(saved, VLMConfig, str(checkpoint / "recipe.yaml")).model_dump(mode="json")
    for name, now in recipe.model.model_dump(mode="json").items():
        before = before_by_name[name]
        if before != now:
            changed = [key for key in now if before.get(key) != now[key]]
            raise ValueError(
                f"checkpoint.save={recipe.checkpoint.save}: holds a run of another model: model.{name} differs in "
                f"{', '.join(changed)}. Give this run another folder, or remove the old one."
            )
