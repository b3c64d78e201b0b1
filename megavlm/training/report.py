"""What a run tells while it trains: Megatron-LM's log line, TensorBoard points, a metrics file, a progress bar.

Only rank 0 writes. ``metrics.jsonl`` holds one line per step and is what pictures are drawn from; a resumed run first
cuts off the steps after its checkpoint.
"""

import contextlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from megavlm.batch import Batch
from megavlm.checkpoint import durable
from megavlm.engines import LossSums, MegatronEngine, StepResult
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER
from megavlm.training.data_report import DataReport, SampleCounts
from megavlm.training.position import Position
from megavlm.training.progress_bar import ProgressBar
from megavlm.training.router_health import RouterHealth
from megavlm.training.spikes import SpikeWatch
from megavlm.training.throughput import Throughput

METRICS_FILE = "metrics.jsonl"


class Report:
    """Collects what each step did and says it every ``log_interval`` steps."""

    def __init__(
        self,
        recipe: Recipe,
        engine: MegatronEngine,
        folder: Path,
        *,
        is_writer: bool,
        iteration: int,
        router_health: RouterHealth | None = None,
        spikes: SpikeWatch | None = None,
        throughput: Throughput | None = None,
    ) -> None:
        """Open the outputs.

        Args:
            recipe: of the run.
            engine: adds up counts over the data-parallel ranks.
            folder: the run folder.
            is_writer: whether this rank writes (rank 0).
            iteration: steps done before; later ones in the metrics file are cut off.
            router_health: of a model with experts.
            spikes: counts spikes of the loss.
            throughput: counts operations.
        """
        self._recipe = recipe
        self._folder = folder
        self.is_writer = is_writer
        """Whether this rank writes."""
        self._engine = engine
        self._router_health = router_health
        self._spikes = spikes
        self._throughput = throughput
        self._totals: Counter[str] = Counter()
        """Skipped and nan iterations since the run (re)started."""
        self._samples = SampleCounts()
        self._data = DataReport(engine, recipe.data.train.source_names, recipe.data.seq_length)
        self._window: list[StepResult] = []
        self._window_start = time.perf_counter()
        self._window_data_wait = 0.0
        self._metrics: TextIO | None = None
        self._tensorboard: SummaryWriter | None = None
        self._progress: ProgressBar | None = None
        if not is_writer:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._open(iteration)
        if sys.stdout.isatty():
            self._progress = ProgressBar(recipe.training.train_iters, iteration)

    def _open(self, iteration: int) -> None:
        """Open the files; what they say of later steps is cut off."""
        path = self._folder / METRICS_FILE
        _cut_metrics(path, after=iteration)
        self._metrics = path.open("a", encoding="utf-8", buffering=1)
        if self._recipe.logging.tensorboard:
            self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=iteration + 1)

    def __enter__(self) -> "Report":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the outputs."""
        for output in (self._metrics, self._tensorboard, self._progress):
            # a full disk, which is an error here too, must not take the place of what it has done before
            with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
                if output is not None:
                    output.close()

    def write_point(self, point: dict[str, Any]) -> None:
        """Add a line to the metrics file; ``point`` has an ``iteration``."""
        if self._metrics is not None:
            self._metrics.write(json.dumps(point) + "\n")

    def go_back(self, iteration: int) -> None:
        """Forget the steps after this one: the run does them again, with other data."""
        self._data.take()
        if self._window and self._router_health is not None:
            self._router_health.take(len(self._window))
        self._window.clear()
        self._window_data_wait = 0.0
        self.restart_clock()
        if self.is_writer:
            for output in (self._metrics, self._tensorboard):
                if output is not None:
                    output.close()
            self._open(iteration)

    def restart_clock(self) -> None:
        """Leave out of the next step time what is not training (validation, saving)."""
        self._window_start = time.perf_counter()

    def step(
        self, position: Position, result: StepResult, batches: Sequence[Batch], lr: float, data_wait: float
    ) -> None:
        """Take in one step.

        Args:
            position: of the run after the step.
            result: what it did.
            batches: this rank's micro-batches, for the samples that were skipped in them.
            lr: learning rate of the step.
            data_wait: seconds that it waited for data.
        """
        iteration = position.iteration
        self._window.append(result)
        self._window_data_wait += data_wait
        self._count(result)
        self._data.add(result, batches)
        self._samples.add(batches)
        if self._throughput is not None:
            self._throughput.add(batches)
        for sample in (sample for batch in batches for sample in batch.skipped):
            LOGGER.warning(
                "skipped sample %s (%s): %s", sample.key, sample.reason, sample.message, extra={"any_rank": True}
            )
        if self._metrics is not None:
            point: dict[str, float | str | None] = {
                "iteration": iteration,
                "lm loss": result.loss,
                "grad norm": result.grad_norm,
                "lr": lr,
                "trained tokens": result.num_trained_tokens,
                "skip reason": result.skip_reason,
                **{f"{name} loss": term for name, term in result.loss_terms.items()},
            }
            self._metrics.write(json.dumps(point) + "\n")
        if self._progress is not None:
            self._progress.show(iteration, result.loss)
        if iteration % self._recipe.logging.log_interval == 0 or iteration == self._recipe.training.train_iters:
            self._flush(position, lr)

    def validation(self, iteration: int, losses: LossSums) -> None:
        """Say a validation loss, in Megatron-LM's words."""
        loss, terms = losses.mean(), losses.mean_terms()
        perplexity = math.exp(min(20.0, loss))
        line = (
            f" validation loss at iteration {iteration} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E} |"
            f" trained tokens: {losses.num_trained_tokens} |"
            + "".join(f" {name} loss: {term:.6E} |" for name, term in terms.items())
        )
        points = {"lm loss validation": loss, **{f"{name} loss validation": term for name, term in terms.items()}}
        LOGGER.info("%s\n%s\n%s", "-" * len(line), line, "-" * len(line))
        if self._metrics is not None:
            self._metrics.write(json.dumps({"iteration": iteration, **points}) + "\n")
        self._add_scalars(iteration, {**points, "lm loss validation ppl": perplexity})

    def router_loads(self, iteration: int) -> bool:
        """Write the load of every expert since the last call. Returns whether there was any, on any rank."""
        health = self._router_health.take_loads() if self._router_health else None
        if health is None:
            return False
        if self._metrics is not None:
            self._metrics.write(json.dumps({"iteration": iteration, "router load": health.loads()}) + "\n")
        if self._tensorboard is not None:
            for view in health.views:
                for layer, load in zip(health.layers, view.load, strict=True):
                    self._tensorboard.add_histogram(f"router/layer_{layer}/load/{view.name}", load, iteration)
        return True

    def _count(self, result: StepResult) -> None:
        if result.skip_reason is not None:
            self._totals["skipped iterations"] += 1
            LOGGER.warning("the weights were not updated: %s (grad norm %s)", result.skip_reason, result.grad_norm)
        if not math.isfinite(result.grad_norm) or not math.isfinite(result.loss):
            self._totals["nan iterations"] += 1

    def _flush(self, position: Position, lr: float) -> None:
        """Write the log line and the TensorBoard points of the steps since the last one."""
        iteration = position.iteration
        num_steps = len(self._window)
        now = time.perf_counter()
        seconds = (now - self._window_start) / num_steps
        trained = [step for step in self._window if step.num_trained_tokens]
        loss = sum(step.loss for step in trained) / len(trained) if trained else 0.0
        names = trained[-1].loss_terms if trained else ()
        terms = {f"{name} loss": sum(step.loss_terms[name] for step in trained) / len(trained) for name in names}
        told = "".join(f" {name}: {term:.6E} |" for name, term in terms.items())
        tokens = sum(step.num_trained_tokens for step in self._window) / num_steps
        batch_size = self._recipe.training.global_batch_size
        samples = self._samples.over_replicas(self._engine)
        throughput = None if self._throughput is None else self._throughput.take(seconds * num_steps)
        data = self._show_data(iteration)
        routers = self._routers(iteration, num_steps)
        # Widths and separators of Megatron-LM's training_log, which many scripts read; what is ours comes after.
        LOGGER.info(
            f"iteration {iteration:8d}/{self._recipe.training.train_iters:8d} |"
            f" consumed samples: {position.consumed_samples:12d} |"
            f" elapsed time per iteration (ms): {seconds * 1000.0:.1f} |"
            + ("" if throughput is None else f" throughput per GPU (TFLOP/s/GPU): {throughput:.3f} |")
            + f" learning rate: {lr:.6E} |"
            f" global batch size: {batch_size:5d} |"
            f" lm loss: {loss:.6E} |"
            f" loss scale: 1.0 |"
            f" grad norm: {self._window[-1].grad_norm:.3f} |"
            f" number of skipped iterations: {self._totals['skipped iterations']:3d} |"
            f" number of nan iterations: {self._totals['nan iterations']:3d} |"
            f" trained tokens per iteration: {tokens:.0f} |"
            f" data wait (ms): {self._window_data_wait / num_steps * 1000.0:.1f} |"
            f"{samples.log_text()}{told}{data}{routers}"
            f"{self._spikes.log_text() if self._spikes else ''}"
        )
        points = {
            "lm loss": loss,
            **terms,
            "learning-rate": lr,
            "batch-size": float(batch_size),
            "grad-norm": self._window[-1].grad_norm,
            "iteration-time": seconds,
            **samples.points(),
            **({} if throughput is None else {"throughput": throughput}),
            **(self._spikes.points() if self._spikes else {}),
        }
        self._add_scalars(position.iteration, points)
        self._window.clear()
        self._window_data_wait = 0.0
        self._window_start = now

    def _show_data(self, iteration: int) -> str:
        """Write what the data of the last steps was; returns the piece of the log line."""
        numbers = self._data.take()
        if numbers is None:
            return ""
        if numbers.sources:
            listed = "; ".join(source.log_text() for source in numbers.sources)
            LOGGER.info("sources (samples / tokens / trained tokens): %s", listed)
            if self._metrics is not None:
                sources = [asdict(source) for source in numbers.sources]
                self._metrics.write(json.dumps({"iteration": iteration, "sources": sources}) + "\n")
        if self._tensorboard is not None:
            for name, value in numbers.points().items():
                self._tensorboard.add_scalar(name, value, iteration)
        return numbers.log_text(is_packed=self._recipe.data.packing is not None)

    def _routers(self, iteration: int, num_steps: int) -> str:
        """Write what the routers did in the last steps; returns the piece of the log line."""
        health = self._router_health.take(num_steps) if self._router_health else None
        if health is None:
            return ""
        if self._metrics is not None:
            self._metrics.write(json.dumps({"iteration": iteration, "router": health.numbers()}) + "\n")
        if self._tensorboard is not None:
            for name, value in health.points().items():
                self._tensorboard.add_scalar(name, value, iteration)
        return health.log_text()

    def _add_scalars(self, iteration: int, points: dict[str, float]) -> None:
        if self._tensorboard is None:
            return
        samples = iteration * self._recipe.training.global_batch_size
        for name, value in points.items():
            self._tensorboard.add_scalar(name, value, iteration)
            self._tensorboard.add_scalar(f"{name} vs samples", value, samples)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the points of a run's metrics file, in the order they were written. All have an ``iteration``."""
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _cut_metrics(path: Path, after: int) -> None:
    """Drop what a run that was killed wrote after the checkpoint it resumes from (its last line may be torn)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            continue
        if point["iteration"] <= after:
            kept.append(line + "\n")
    # never half written: what was said of earlier steps is nowhere else
    durable.replace_file(path, "".join(kept).encode())
