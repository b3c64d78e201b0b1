"""The training loop: one stage of one run, from its recipe to its last checkpoint."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megavlm.batch import Batch
from megavlm.build import Parts, build_parts
from megavlm.checkpoint import RunFolder, find_to_resume, load_checkpoint
from megavlm.config import save_recipe, validate
from megavlm.data import LaneProgress, Loader, PackedLoader, Progress
from megavlm.engines import MegatronEngine, StepResult
from megavlm.engines.feed import Feed, is_reader
from megavlm.engines.lockstep import check_lockstep
from megavlm.models.config import VLMConfig
from megavlm.models.initialization import initialize_weights
from megavlm.models.part import PARTS, part_of
from megavlm.models.weights import count_parameters
from megavlm.recipe import Recipe
from megavlm.runtime.activity import ACTIVITY, Phase
from megavlm.runtime.log import LOGGER
from megavlm.runtime.process import Process
from megavlm.runtime.signals import StopRequest, stop_on_signals
from megavlm.runtime.watchdog import Watchdog
from megavlm.training.feeding import (
    build_training_loader,
    build_validation_loader,
    data_order_of,
    open_data,
    tell_other_order,
    training_steps,
)
from megavlm.training.freeze import freeze_except, scale_learning_rates
from megavlm.training.picture import draw_loss
from megavlm.training.position import Position
from megavlm.training.report import Report
from megavlm.training.rewind import go_back, tell_spike
from megavlm.training.router_health import router_health_of
from megavlm.training.router_picture import draw_routers
from megavlm.training.saver import Saver
from megavlm.training.schedule import build_schedule, current_lr
from megavlm.training.spikes import SpikeWatch


@dataclass
class _Run:
    """What the steps of a run work with, on this rank."""

    parts: Parts
    position: Position
    feed: Feed
    training_data: Loader | PackedLoader | None
    """What the feed reads from, on the reader."""
    validation: Loader | None
    """The validation pass, on the reader."""
    report: Report
    saver: Saver
    spikes: SpikeWatch | None

    @property
    def recipe(self) -> Recipe:
        return self.parts.recipe


def train(recipe: Recipe, process: Process) -> None:
    """Run one stage: start or resume, train, validate, save, draw.

    The default process group must exist. A run folder that holds a checkpoint is resumed, with the same losses and the
    same data as if it had never stopped.

    Raises:
        ValueError: something in the recipe, the data or the checkpoint does not fit; said before the first step where
            it can be known.
    """
    folder = RunFolder(recipe.checkpoint.save)
    started = time.perf_counter()
    if process.rank == 0:
        folder.clean()
    parts = build_parts(recipe, world_size=process.world_size)
    train_data, valid_data = open_data(recipe) if is_reader() else (None, None)
    spikes = None if recipe.training.loss_spike is None else SpikeWatch(recipe.training.loss_spike)
    data_order = None if train_data is None else data_order_of(recipe, train_data)
    position, progress = _prepare_model(parts, folder, spikes, data_order)
    if process.rank == 0:
        folder.path.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, folder.path / "recipe.yaml")
    if position.iteration >= recipe.training.train_iters:
        LOGGER.info("%s: all %d steps are done already.", folder.path, recipe.training.train_iters)
        return
    training_data = None if train_data is None else build_training_loader(parts, train_data, progress)
    validation = None if valid_data is None else build_validation_loader(parts, valid_data)
    LOGGER.info("ready after %.1f s", time.perf_counter() - started)
    is_writer = process.rank == 0
    with (
        stop_on_signals() as stop,
        Watchdog(
            process.rank,
            process.world_size,
            hang_seconds=recipe.engine.hang_timeout_seconds,
            lost_seconds=recipe.engine.lost_timeout_seconds,
            is_asked_to_stop=lambda: bool(stop),
        ),
        Report(
            recipe,
            parts.engine,
            folder.path,
            is_writer=is_writer,
            iteration=position.iteration,
            router_health=router_health_of(parts),
            spikes=spikes,
        ) as report,
    ):
        feed = Feed(None if training_data is None else training_steps(parts, training_data))
        saver = Saver(parts, folder, data_order)
        _run_steps(_Run(parts, position, feed, training_data, validation, report, saver, spikes), stop)
    if is_writer:
        LOGGER.info("loss curve: %s", draw_loss(folder.path))


def _prepare_model(
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
    engine.num_sources = len(recipe.data.train.source_names)
    found = freeze_except(chunks, recipe.training.trained)
    _check_modules_found(parts, found)
    scale_learning_rates(chunks, recipe.training.lr_scale)
    _log_parameters(parts, chunks)
    engine.wrap(chunks)
    engine.build_optimizer(recipe.training.optimizer)
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
    _start_from_weights(recipe, engine)
    return Position(), Progress.after(0)


def _check_modules_found(parts: Parts, found: Collection[str]) -> None:
    """Collective: each module of ``training.trainable_within`` is on some rank."""
    for part, modules in parts.recipe.training.trained.within.items():
        for module in modules:
            if not parts.engine.any_rank(f"{part}.{module}" in found):
                raise ValueError(
                    f"training.trainable_within.{part}={modules}: no parameter of {part} lies in {module!r}. Names are "
                    "those of the model's modules below the part, as `megavlm plan --modules` lists them."
                )


def _start_from_weights(recipe: Recipe, engine: MegatronEngine) -> None:
    """Load the weights that a fresh run starts from, if there are any.

    Raises:
        ValueError: they do not fit, or a part that none of them holds would stay as it was drawn.
    """
    sources = recipe.checkpoint.pretrained_checkpoints
    if not sources:
        return
    absent = set(PARTS)
    for source in sources:
        verify = recipe.checkpoint.verify
        loaded = load_checkpoint(source, engine, with_optimizer=False, verify=verify, allow_missing_parts=PARTS)
        absent &= {part_of(key) for key in loaded.missing}
        LOGGER.info("starting from the weights of %s", source)
    trained = recipe.training.trained
    if frozen := sorted(part for part in absent if not trained.is_whole(part)):
        raise ValueError(
            f"training.trainable={recipe.training.trainable}: {', '.join(map(str, sources))} holds no "
            f"{' and no '.join(frozen)}, so that would stay untrained in whole or in part. Add it to the parts that "
            "train, or give weights for it."
        )


def _run_steps(run: _Run, stop: StopRequest) -> None:
    training, engine, position = run.recipe.training, run.parts.engine, run.position
    schedule = _schedule(run)
    deadline = time.monotonic() + (training.exit_duration_in_mins or float("inf")) * 60.0
    while position.iteration < training.train_iters:
        ACTIVITY.begin(Phase.READING, step=position.iteration + 1)
        waiting_since = time.perf_counter()
        batches = next(run.feed)
        data_wait = time.perf_counter() - waiting_since
        ACTIVITY.begin(Phase.COMPARING)
        check_lockstep(batches, step=position.iteration + 1, replica=engine.data_parallel_rank, device=engine.device)
        schedule.step(increment=1)
        accept = run.spikes.accepts if run.spikes is not None and run.spikes.decides_updates else None
        result = engine.train_step(batches, accept)
        position.iteration += 1
        position.consumed_samples += training.global_batch_size
        ACTIVITY.begin(Phase.REPORTING)
        run.saver.poll()
        run.report.step(position, result, batches, current_lr(engine.optimizer), data_wait)
        if run.spikes is not None and _answer_spike(run, result, batches):
            schedule = _schedule(run)
            continue

        is_last = position.iteration == training.train_iters
        must_stop = engine.any_rank(bool(stop) or time.monotonic() > deadline)
        is_evaluated = is_last or _is_due(position.iteration, training.eval_interval)
        is_saved = is_last or must_stop or _is_due(position.iteration, run.recipe.checkpoint.save_interval)
        if is_evaluated:
            _validate(run)
        if is_saved:
            ACTIVITY.begin(Phase.SAVING)
            run.saver.save(position, _progress(run), run.spikes)
        if is_evaluated or is_saved:
            _show_routers(run)
            run.report.restart_clock()
        if must_stop and not is_last:
            reason = stop.name or "time is up"
            LOGGER.info("stopping after step %d (%s); the same command resumes it", position.iteration, reason)
            break
    ACTIVITY.begin(Phase.ENDING)
    run.saver.finish()


def _schedule(run: _Run) -> OptimizerParamScheduler:
    """The learning rate as it stands at the run's position."""
    training = run.recipe.training
    optimizer = run.parts.engine.optimizer
    return build_schedule(
        optimizer, training.optimizer, train_iters=training.train_iters, iteration=run.position.iteration
    )


def _answer_spike(run: _Run, result: StepResult, batches: Sequence[Batch]) -> bool:
    """Tell a spike of the loss if there is one. Returns whether the run was put back to a checkpoint."""
    assert run.spikes is not None
    spike = run.spikes.take(run.position.iteration, result)
    if spike is None:
        return False
    samples = tell_spike(run.parts, run.report, spike, batches)
    if not spike.must_rewind:
        return False
    run.saver.finish()
    return go_back(run.parts, run.report, run.position, run.spikes, spike, samples)


def _progress(run: _Run) -> Progress:
    """Which samples all ranks have used."""
    lanes: Mapping[int, LaneProgress] = {} if run.training_data is None else run.training_data.lanes
    gathered = run.parts.engine.gather_over_replicas(dict(lanes))
    # ranks that read no data write no description of the run either
    return Progress.gathered(gathered)


def _is_due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def _validate(run: _Run) -> None:
    """Mean loss over the whole validation data."""
    if run.recipe.data.valid is None:
        return
    ACTIVITY.begin(Phase.VALIDATING)
    loss_sum, num_tokens = 0.0, 0
    for batches in Feed(iter(run.validation) if run.validation is not None else None):
        ACTIVITY.advance()
        step_loss, step_tokens = run.parts.engine.evaluate(batches)
        loss_sum += step_loss
        num_tokens += step_tokens
    run.report.validation(run.position.iteration, loss_sum / max(1, num_tokens), num_tokens)
    run.report.restart_clock()


def _show_routers(run: _Run) -> None:
    """Draw the load of the experts, on the rank that writes."""
    has_loads = run.report.router_loads(run.position.iteration)
    if has_loads and run.report.is_writer:
        draw_routers(run.recipe.checkpoint.save)


def _log_parameters(parts: Parts, chunks: list) -> None:
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
