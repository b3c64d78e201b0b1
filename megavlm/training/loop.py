"""The training loop: one stage of one run, from its recipe to its last checkpoint."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from megavlm.build import Parts, build_parts
from megavlm.checkpoint import AsyncSaver, RunFolder, find_checkpoint, load_checkpoint, save_checkpoint
from megavlm.config import dump_recipe, save_recipe
from megavlm.data import Dataset, DatasetConfig, Loader
from megavlm.engines import MegatronEngine
from megavlm.engines.feed import Feed, is_reader
from megavlm.models.initialization import initialize_weights
from megavlm.models.part import PARTS, part_of
from megavlm.models.weights import count_parameters
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER
from megavlm.runtime.process import Process
from megavlm.runtime.signals import StopRequest, stop_on_signals
from megavlm.training.freeze import freeze_except
from megavlm.training.picture import draw_loss
from megavlm.training.position import Position
from megavlm.training.report import Report
from megavlm.training.router_health import router_health_of
from megavlm.training.router_picture import draw_routers
from megavlm.training.schedule import build_schedule, current_lr


@dataclass
class _Run:
    """What the steps of a run work with, on this rank."""

    parts: Parts
    position: Position
    feed: Feed
    validation: Loader | None
    """The validation pass, on the reader."""
    report: Report
    saver: "_Saver"

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
    train_data, valid_data = _open_data(recipe) if is_reader() else (None, None)
    position = _prepare_model(parts, folder)
    if process.rank == 0:
        folder.path.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, folder.path / "recipe.yaml")
    if position.iteration >= recipe.training.train_iters:
        LOGGER.info("%s: all %d steps are done already.", folder.path, recipe.training.train_iters)
        return
    steps = validation = None
    if train_data is not None:
        steps = iter(build_loader(parts, train_data, endless=True, consumed_samples=position.consumed_samples))
    if valid_data is not None:
        validation = build_loader(parts, valid_data, endless=False)
    LOGGER.info("ready after %.1f s", time.perf_counter() - started)
    is_writer = process.rank == 0
    with (
        stop_on_signals() as stop,
        Report(
            recipe,
            parts.engine,
            folder.path,
            is_writer=is_writer,
            iteration=position.iteration,
            router_health=router_health_of(parts),
        ) as report,
    ):
        _run_steps(_Run(parts, position, Feed(steps), validation, report, _Saver(parts, folder)), stop)
    if is_writer:
        LOGGER.info("loss curve: %s", draw_loss(folder.path))


def _open_data(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """Open training and validation data; rows that cannot be used are told now."""

    def open_one(config: DatasetConfig) -> Dataset:
        dataset = config.build()
        LOGGER.info("%d samples in %s, %d unusable rows left out", len(dataset), config.path, dataset.num_bad_rows)
        for row in dataset.bad_rows:
            LOGGER.warning("unusable row: %s", row)
        return dataset

    return open_one(recipe.data.train), open_one(recipe.data.valid) if recipe.data.valid else None


def build_loader(parts: Parts, dataset: Dataset, *, endless: bool, consumed_samples: int = 0) -> Loader:
    """Make the loader of training data (endless) or of one pass over validation data, as the recipe says."""
    recipe, engine = parts.recipe, parts.engine
    return Loader(
        dataset,
        parts.processor,
        micro_batch_size=recipe.training.micro_batch_size,
        global_batch_size=recipe.training.global_batch_size,
        data_parallel_rank=engine.data_parallel_rank,
        data_parallel_size=engine.data_parallel_size,
        seed=recipe.training.seed,
        shuffle=recipe.data.shuffle and endless,
        num_workers=recipe.data.num_workers if endless else 0,
        pad_multiple=parts.pad_multiple,
        consumed_samples=consumed_samples,
        endless=endless,
        timeout_seconds=recipe.data.worker_timeout_seconds,
    )


def _prepare_model(parts: Parts, folder: RunFolder) -> Position:
    """Build, fill, freeze and wrap the model; make the optimizer; load what there is to load."""
    recipe, engine = parts.recipe, parts.engine
    chunks = parts.build_chunks()
    resume_from = find_checkpoint(folder)
    if resume_from is None:
        initialize_weights(chunks, recipe.training.seed)
    freeze_except(chunks, recipe.training.trainable)
    _log_parameters(parts, chunks)
    engine.wrap(chunks)
    engine.build_optimizer(recipe.training.optimizer)
    if resume_from is not None:
        _check_same_model(recipe, resume_from)
        loaded = load_checkpoint(resume_from, engine, with_optimizer=True, verify=recipe.checkpoint.verify)
        LOGGER.info("resuming %s after step %d", folder.path, loaded.iteration)
        return Position(loaded.iteration, loaded.extra["consumed_samples"])
    _start_from_weights(recipe, engine)
    return Position()


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
    if frozen := sorted(absent.difference(recipe.training.trainable)):
        raise ValueError(
            f"training.trainable={recipe.training.trainable}: {', '.join(map(str, sources))} holds no "
            f"{' and no '.join(frozen)}, so that would stay untrained. Add it to the parts that train, or "
            "give weights for it."
        )


def _run_steps(run: _Run, stop: StopRequest) -> None:
    training, engine, position = run.recipe.training, run.parts.engine, run.position
    schedule = build_schedule(
        engine.optimizer, training.optimizer, train_iters=training.train_iters, iteration=position.iteration
    )
    deadline = time.monotonic() + (training.exit_duration_in_mins or float("inf")) * 60.0
    while position.iteration < training.train_iters:
        waiting_since = time.perf_counter()
        batches = next(run.feed)
        data_wait = time.perf_counter() - waiting_since
        schedule.step(increment=1)
        result = engine.train_step(batches)
        position.iteration += 1
        position.consumed_samples += training.global_batch_size
        run.saver.poll()
        run.report.step(position, result, batches, current_lr(engine.optimizer), data_wait)

        is_last = position.iteration == training.train_iters
        must_stop = engine.any_rank(bool(stop) or time.monotonic() > deadline)
        is_evaluated = is_last or _is_due(position.iteration, training.eval_interval)
        is_saved = is_last or must_stop or _is_due(position.iteration, run.recipe.checkpoint.save_interval)
        if is_evaluated:
            _validate(run)
        if is_saved:
            run.saver.save(position)
        if is_evaluated or is_saved:
            _show_routers(run)
            run.report.restart_clock()
        if must_stop and not is_last:
            reason = stop.name or "time is up"
            LOGGER.info("stopping after step %d (%s); the same command resumes it", position.iteration, reason)
            break
    run.saver.finish()


def _is_due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def _validate(run: _Run) -> None:
    """Mean loss over the whole validation data."""
    if run.recipe.data.valid is None:
        return
    loss_sum, num_tokens = 0.0, 0
    for batches in Feed(iter(run.validation) if run.validation is not None else None):
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


class _Saver:
    """Saves checkpoints of a run, beside training if the recipe says so."""

    def __init__(self, parts: Parts, folder: RunFolder) -> None:
        self._parts = parts
        self._folder = folder
        self._asynchronous = AsyncSaver() if parts.recipe.checkpoint.async_save else None

    def save(self, position: Position) -> None:
        """Save, or begin to save, the run as it is now."""
        recipe = self._parts.recipe
        with _tokenizer_files(self._parts) as files:
            save = self._asynchronous.save if self._asynchronous else save_checkpoint
            save(
                self._folder,
                position.iteration,
                self._parts.engine,
                extra={"consumed_samples": position.consumed_samples},
                files={"recipe.yaml": dump_recipe(recipe), **files},
                keep_last=recipe.checkpoint.keep_last,
            )

    def poll(self) -> None:
        """Complete a checkpoint that has been written meanwhile."""
        if self._asynchronous is not None and (path := self._asynchronous.poll()):
            LOGGER.info("saved %s", path)

    def finish(self) -> None:
        """Wait for a checkpoint on its way."""
        if self._asynchronous is not None:
            self._asynchronous.finish()


@contextlib.contextmanager
def _tokenizer_files(parts: Parts) -> Iterator[dict[str, Path]]:
    """The tokenizer's files, by their names in the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        parts.tokenizer.save(Path(folder))
        yield {f"tokenizer/{path.name}": path for path in Path(folder).iterdir()}


def _log_parameters(parts: Parts, chunks: list) -> None:
    """Say how many parameters each part has and which of them train."""
    counts = count_parameters(chunks)
    totals = parts.engine.sum_over_ranks([float(counts[name]) for name in PARTS])
    for name, total in zip(PARTS, totals, strict=True):
        if total:
            state = "trains" if name in parts.recipe.training.trainable else "frozen"
            LOGGER.info("%-15s %15s parameters, %s", name, f"{total:,.0f}", state)


def _check_same_model(recipe: Recipe, checkpoint: Path) -> None:
    """A run is resumed with the model it was begun with.

    Raises:
        ValueError: the recipe describes another model than the checkpoint's.
    """
    saved = yaml.safe_load((checkpoint / "recipe.yaml").read_text(encoding="utf-8"))
    for name, now in recipe.model_dump(mode="json")["model"].items():
        before = saved["model"].get(name)
        if before != now:
            changed = [key for key in now if before is None or before.get(key) != now[key]]
            raise ValueError(
                f"checkpoint.save={recipe.checkpoint.save}: holds a run of another model: model.{name} differs in "
                f"{', '.join(changed)}. Give this run another folder, or remove the old one."
            )
