"""The ``upcycle`` verb: from a dense model to a run folder of one with experts, a tensor at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from megavlm.checkpoint import RunFolder
from megavlm.checkpoint.folder import RELEASE
from megavlm.checkpoint.release import RunState, write_release
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.config import dump_recipe
from megavlm.convert.carried import CARRIED_NAME, write_carried
from megavlm.convert.parts import MODEL_NAME, RECIPE_NAME, ModelFile, weight_shapes
from megavlm.convert.receipt.output import MAX_RELATIVE_DIFFERENCE
from megavlm.convert.staging import progress_bar, staged
from megavlm.models.language import LanguageConfig
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER
from megavlm.upcycle.dense import MOE_OVERRIDE, DenseModel, open_dense, with_experts
from megavlm.upcycle.expert import ExpertWeights
from megavlm.upcycle.optimizer import CarriedOptimizer
from megavlm.upcycle.plan import OPTION_OF_FIELD, UpcycleSettings
from megavlm.upcycle.probe import ProbeRow, Side, compare


@dataclass(frozen=True)
class Upcycled:
    """What was made."""

    checkpoint: Path
    language: LanguageConfig
    """With its experts."""
    reasons_not_exact: list[str]
    """Why it does not start as the dense model; nothing if it does."""
    rows: list[ProbeRow]
    """The measured differences; nothing if none were measured."""


def upcycle_folder(
    source: Path,
    target: Path,
    settings: UpcycleSettings,
    overrides: Sequence[str] = (),
    *,
    optimizer: Literal["fresh", "carried"] = "fresh",
    probe: bool = True,
) -> Upcycled:
    """Make a run folder of a model with experts from a dense one.

    Args:
        source: a run folder, of which the newest checkpoint is taken, a checkpoint, or a Hugging Face folder. A whole
            model or a language model alone.
        target: the run folder to make; must not exist.
        settings: how.
        overrides: ``key=value`` changes to the dense model's recipe; ``model.language.moe.*`` for what the settings do
            not say.
        optimizer: ``fresh``: ``release/``, which other runs start from. ``carried``: ``iter_<step>/``, from which the
            dense run goes on.
        probe: compare the logits of both models, each whole in memory in float32.

    Returns:
        What was made.

    Raises:
        ValueError: something does not fit, or the logits differ where they may not; nothing is left behind.
    """
    _check_overrides(overrides)
    moe_overrides = [text for text in overrides if text.startswith(MOE_OVERRIDE)]
    others = [text for text in overrides if text not in moe_overrides]
    dense = open_dense(source, target, others, keeps_step=optimizer == "carried")
    fields = settings.moe_fields(dense.language)
    model = with_experts(dense.model, fields, moe_overrides)
    recipe = None if dense.recipe is None else with_experts(dense.recipe, fields, moe_overrides)
    language = model.model.language
    assert language is not None
    assert language.moe is not None
    wanted = weight_shapes(model.model, dense.vocab_size)
    std = settings.router_std or language.init_method_std
    weights = ExpertWeights(dense.tensors, dense.read, wanted, settings, std)
    carried = CarriedOptimizer(dense, weights) if optimizer == "carried" else None
    if carried is not None and recipe is not None:
        resumed = recipe.checkpoint.model_copy(update={"save": target.absolute()})
        recipe = recipe.model_copy(update={"checkpoint": resumed})
    reasons = settings.reasons_not_exact(language.moe, weights.expert_dtypes)
    rows: list[ProbeRow] = []
    with staged(target) as folder:
        written = _write(folder, dense, weights, carried, model, recipe)
        if probe:
            own = Side(model.model, CheckpointWeights(written).__getitem__)
            rows = compare(Side(dense.model.model, dense.read), own, dense.vocab_size)
        _require(rows, reasons)
    return Upcycled(target / written.name, language, reasons, rows)


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides of what options say.

    Raises:
        ValueError: there is one; names the option.
    """
    for text in overrides:
        field = text.partition("=")[0].removeprefix(MOE_OVERRIDE)
        if text.startswith(MOE_OVERRIDE) and field in OPTION_OF_FIELD:
            raise ValueError(f"{text}: the weights are made for it. Say it with {OPTION_OF_FIELD[field]}.")


def _write(
    folder: Path,
    dense: DenseModel,
    weights: ExpertWeights,
    carried: CarriedOptimizer | None,
    model: ModelFile,
    recipe: Recipe | None,
) -> Path:
    """Write the run folder. Returns its checkpoint."""
    tensors, files = dict(weights.tensors), dict(dense.files)
    run: RunState | None = None
    (folder / MODEL_NAME).write_text(model.dump(), encoding="utf-8")
    files[MODEL_NAME] = model.dump().encode()
    if recipe is not None:
        files[RECIPE_NAME] = dump_recipe(recipe).encode()
    if carried is not None:
        tensors |= carried.tensors
        files |= carried.files
        run = carried.run
        (folder / RECIPE_NAME).write_bytes(bytes(files[RECIPE_NAME]))
    unused = folder / Path(CARRIED_NAME).name
    if dense.incoming is not None and dense.incoming.carried:
        write_carried(unused, dense.incoming.carried, dense.incoming.read_carried)
        files[CARRIED_NAME] = unused
    with progress_bar() as progress:
        task = progress.add_task(f"writing {RELEASE if run is None else run.iteration}", total=len(tensors))

        def read(key: str) -> Tensor:
            progress.advance(task)
            if carried is not None and key in carried.tensors:
                return carried.read(key)
            return weights.read(key)

        written = write_release(RunFolder(folder), tensors, read, files, run)
    unused.unlink(missing_ok=True)
    LOGGER.info("%d tensors of %s", len(tensors), dense.source)
    return written


def _require(rows: Sequence[ProbeRow], reasons: Sequence[str]) -> None:
    """Refuse differences where the settings promise none.

    Raises:
        ValueError: names the input and both numbers.
    """
    for row in rows if not reasons else ():
        if not row.max_rel <= MAX_RELATIVE_DIFFERENCE:
            raise ValueError(
                f"{row.name}: the upcycled logits differ from the dense ones by {row.max_abs:.3g} "
                f"({row.max_rel:.3g} of the largest), and with these settings may by {MAX_RELATIVE_DIFFERENCE:g}. "
                "Nothing was kept: this is an error of the program or of the machine; --no-probe keeps the result."
            )
