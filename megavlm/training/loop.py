"""The training loop: one stage of one run, from its recipe to its last checkpoint."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megavlm.batch import Batch
from megavlm.build import Parts, build_parts
from megavlm.checkpoint import RunFolder
from megavlm.config import save_recipe
from megavlm.data import LaneProgress, Loader, PackedLoader, Progress
from megavlm.engines import LossSums, StepResult
from megavlm.engines.feed import Feed, is_reader
from megavlm.engines.lockstep import check_lockstep
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
    training_steps,
)
from megavlm.training.picture import draw_loss
from megavlm.training.position import Position
from megavlm.training.prepare_model import prepare_model
from megavlm.training.report import Report
from megavlm.training.rewind import go_back, tell_spike
from megavlm.training.router_health import router_health_of
from megavlm.training.router_picture import draw_routers
from megavlm.training.saver import Saver
from megavlm.training.schedule import build_schedule, current_lr
from megavlm.training.spikes import SpikeWatch
from megavlm.training.throughput import throughput_of


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
    position, progress = prepare_model(parts, folder, spikes, data_order)
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
            throughput=throughput_of(parts, process.world_size),
        ) as report,
    ):
        feed = Feed(None if training_data is None else training_steps(parts, training_data))
        saver = Saver(parts, folder, data_order)
        _run_steps(_Run(parts, position, feed, training_data, validation, report, saver, spikes), stop)
    if is_writer:
        LOGGER.info("loss curve: %s", draw_loss(folder.path))


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
    losses = LossSums()
    for batches in Feed(iter(run.validation) if run.validation is not None else None):
        ACTIVITY.advance()
        losses += run.parts.engine.evaluate(batches)
    run.report.validation(run.position.iteration, losses)
    run.report.restart_clock()


def _show_routers(run: _Run) -> None:
    """Draw the load of the experts, on the rank that writes."""
    has_loads = run.report.router_loads(run.position.iteration)
    if has_loads and run.report.is_writer:
        draw_routers(run.recipe.checkpoint.save)
