"""The file of a comparison: which stages, which variants, which seeds, and what recipe each run gets from it."""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic

from megavlm.benchmark.override import share_out
from megavlm.build import build_processor, check_run
from megavlm.config import Config, load_recipe
from megavlm.data.datasets import DatasetConfig
from megavlm.recipe import Recipe

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
SCORES_FOLDER = "scores"
"""In the folder of a last stage: results on ``scores``."""
_OWN_KEYS = {"checkpoint.save": "`save`", "training.seed": "`seeds`"}
"""Keys of a recipe that the comparison sets itself -> the key of the comparison that they come from."""


class TimingConfig(Config):
    """How the variants are timed: in turns, so that a machine that gets slower slows all of them."""

    rounds: pydantic.PositiveInt = 3
    """Turns of each variant."""
    steps: pydantic.PositiveInt = 5
    """Steps of a turn that are timed."""
    warmup_steps: pydantic.NonNegativeInt = 2
    """Steps before them that are not."""


class Comparison(Config):
    """Variants of a chain of recipes, to be trained, evaluated and timed beside each other."""

    stages: list[Path] = pydantic.Field(min_length=1)
    """Recipes in the order they are trained, relative to the comparison's file; each starts from the one before."""
    overrides: list[str] = []
    """``key=value`` for every stage of every variant."""
    variants: dict[str, list[str]] = pydantic.Field(min_length=1)
    """Name -> its ``key=value`` for every stage, or ``STAGE.key=value`` for one of them alone. The first is what the
    others' speed is divided by."""
    scores: dict[str, DatasetConfig] = {}
    """Name -> held-out conversations on which the last stage is evaluated besides ``data.valid``: text alone, for
    instance. Each is a column of the table."""
    seeds: list[pydantic.NonNegativeInt] = pydantic.Field(default=[1], min_length=1)
    """Each variant is trained once with each as ``training.seed``; the first one is timed."""
    save: Path
    """Folder of all runs and results, relative to the current folder."""
    speed: TimingConfig | None = TimingConfig()
    """How the last stage is timed; null: not at all."""
    train: bool = True
    """Whether to train and evaluate; false: only timing."""

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> "Comparison":
        for key, named in (("variants", self.variants), ("scores", self.scores)):
            for name in named:
                if not _FOLDER_NAME.fullmatch(name):
                    raise ValueError(
                        f"{key}={name!r}: is also a folder's name, so it may hold letters, digits and . _ + - only and "
                        "begins with a letter or digit. Rename it."
                    )
        for key, names in (("seeds", list(map(str, self.seeds))), ("stages", self.stage_names)):
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise ValueError(
                    f"{key}={', '.join(names)}: {twice[0]} is there twice, and both would share a run folder. Rename "
                    "or remove one."
                )
        for where, overrides in {"overrides": self.overrides, **_by_name(self.variants)}.items():
            for override in overrides:
                check_override(where, self._of_stage(override)[1])
        if not self.train and self.speed is None:
            raise ValueError("train=False: and speed=null, so there is nothing to do. Leave one of them out.")
        return self

    @property
    def stage_names(self) -> list[str]:
        """Of the stages' files, without their endings."""
        return [path.stem for path in self.stages]

    def overrides_for(self, stage: str, variant: str) -> list[str]:
        """What changes a stage's recipe in a variant: what is for every stage, and what is for this one."""
        meant = [self._of_stage(override) for override in (*self.overrides, *self.variants[variant])]
        return [override for name, override in meant if name in (None, stage)]

    def _of_stage(self, override: str) -> tuple[str | None, str]:
        """The stage that an override is for, and the override of its recipe; None: for every stage."""
        for name in sorted(self.stage_names, key=len, reverse=True):  # one name may begin like another
            if name not in Recipe.model_fields and override.startswith(f"{name}."):
                return name, override.removeprefix(f"{name}.")
        return None, override


@dataclass(frozen=True)
class PlannedStage:
    """A stage of one run of one variant."""

    name: str
    """Of the recipe's file, without its ending."""
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.recipe.checkpoint.save

    @property
    def file(self) -> Path:
        """Where the resolved recipe is written for the run, so that an edit of its source meanwhile changes nothing."""
        return self.folder.with_name(self.folder.name + ".yaml")


@dataclass(frozen=True)
class PlannedScore:
    """Held-out conversations that a run is evaluated on besides its recipe's."""

    name: str
    dataset: DatasetConfig
    folder: Path
    """Of the results."""

    @property
    def file(self) -> Path:
        """Where the dataset is written before the evaluation, so that results on another one are noticed."""
        return self.folder.with_name(self.folder.name + ".yaml")


@dataclass(frozen=True)
class Chain:
    """A variant with a seed: all its stages."""

    variant: str
    seed: int
    stages: tuple[PlannedStage, ...]
    scores: tuple[PlannedScore, ...] = ()

    @property
    def last(self) -> PlannedStage:
        """The stage that is evaluated and timed."""
        return self.stages[-1]


def load_comparison(path: Path, overrides: Sequence[str]) -> tuple[Comparison, list[str]]:
    """Read a comparison's file and share out the overrides of the command line.

    A key that begins with a part of a recipe (``model``, ``training`` ...) is for the recipes, one that begins with a
    key of the comparison (``save``, ``seeds`` ...) for the comparison.

    Returns:
        The comparison, its stages relative to the current folder, and the overrides for every recipe.

    Raises:
        ValueError: the file or an override is wrong; names the key and the nearest valid one.
    """
    own, recipes = share_out(overrides, Comparison, "comparison", check_override)
    comparison = load_recipe(path, own, Comparison)
    stages = [path.parent / stage for stage in comparison.stages]
    return comparison.model_copy(update={"stages": stages}), recipes


def plan_chains(comparison: Comparison, overrides: Sequence[str], num_ranks: int) -> list[Chain]:
    """Resolve and check the recipe of every stage of every run.

    Later ones win: the comparison's overrides, the variant's, ``overrides`` (of the command line), and at last the
    run's own seed and folder.

    Returns:
        A chain for each variant of the first seed, then of the second ...

    Raises:
        ValueError: a recipe is wrong, its layout does not fit the ranks, or there is nothing to evaluate on. Names the
            variant and the stage.
    """
    chains = []
    for seed in comparison.seeds:
        for variant in comparison.variants:
            stages: list[PlannedStage] = []
            for file in comparison.stages:
                folder = comparison.save / variant / f"seed{seed}" / file.stem
                fixed = [f"training.seed={seed}", f"checkpoint.save={json.dumps(str(folder))}"]  # JSON is YAML
                if stages:
                    fixed.append(f"checkpoint.pretrained_checkpoint={json.dumps(str(stages[-1].folder))}")
                with _naming(f"variants.{variant}, stage {file.stem}"):
                    own = comparison.overrides_for(file.stem, variant)
                    recipe = load_recipe(file, [*own, *overrides, *fixed], Recipe)
                    check_run(recipe, num_ranks)
                stages.append(PlannedStage(file.stem, recipe))
            if comparison.train and stages[-1].recipe.data.valid is None:
                raise ValueError(
                    f"variants.{variant}: data.valid=None in its last stage {stages[-1].name}: there is nothing to "
                    "evaluate on. Name a dataset."
                )
            place = stages[-1].folder / SCORES_FOLDER
            scores = (PlannedScore(name, dataset, place / name) for name, dataset in comparison.scores.items())
            chains.append(Chain(variant, seed, tuple(stages), tuple(scores)))
    return chains


def check_inputs(chains: Sequence[Chain]) -> None:
    """Open every tokenizer and dataset once, so that a missing file is told before the first run.

    Raises:
        ValueError: one of them cannot be used; names the variant and the stage.
    """
    seen = set()
    for chain in chains:
        for stage in chain.stages:
            recipe = stage.recipe
            with _naming(f"variants.{chain.variant}, stage {stage.name}"):
                build_processor(recipe)
                used = [recipe.data.train, recipe.data.valid, *(score.dataset for score in chain.scores)]
                for dataset in used:
                    if dataset is not None and (text := dataset.model_dump_json()) not in seen:
                        dataset.build()
                        seen.add(text)


def check_override(where: str, override: str) -> None:
    """Refuse a key that the comparison sets itself.

    Raises:
        ValueError: it is one.
    """
    key = override.partition("=")[0]
    if key in _OWN_KEYS:
        raise ValueError(f"{where}={override!r}: a comparison sets {key} itself. Use {_OWN_KEYS[key]}.")


def _by_name(variants: dict[str, list[str]]) -> dict[str, list[str]]:
    return {f"variants.{name}": overrides for name, overrides in variants.items()}


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    """Put the place before the message of a ``ValueError`` that leaves the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
