"""What a comparison has found so far, read from its folders, as JSON and as a table."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import rich.box
from rich.console import Console
from rich.table import Table

from megavlm.benchmark.comparison import Chain, Comparison
from megavlm.benchmark.job import EVALUATION_FILE, is_evaluated, round_file
from megavlm.benchmark.speed import Speed, read_speed
from megavlm.training.report import read_metrics

T = TypeVar("T")
TITLES = (
    "variant",
    "exact match",
    "blank images",
    "validation loss",
    "samples/s",
    "ratio",
    "tokens/s",
    "GFLOP a sample",
    "TFLOP a run",
    "dispatch",
    "peak MiB",
)
_NOT_WRAPPED = ("variant", "samples/s", "tokens/s", "ratio")
"""Columns that keep their width on a narrow screen."""


@dataclass(frozen=True)
class RunResult:
    """What a trained and evaluated variant came to, with one seed."""

    variant: str
    seed: int
    exact_match: float
    blank_images: float
    most_frequent_answer: float
    num_questions: int
    by_num_tiles: dict[str, tuple[float, int]]
    """Tiles of a question -> exact match and number of questions."""
    validation_loss: float | None
    """At the end of the last stage."""
    scores: dict[str, float] = field(default_factory=dict)
    """Exact match on each of the comparison's ``scores``."""


@dataclass(frozen=True)
class Results:
    """All that is known."""

    variants: list[str]
    runs: list[RunResult]
    rounds: list[dict[str, Speed]]
    """Complete rounds: variant -> its measurement."""
    scores: list[str] = field(default_factory=list)
    """Names of what the runs are evaluated on besides their held-out data."""

    def of(self, variant: str) -> list[RunResult]:
        """The runs of a variant."""
        return [run for run in self.runs if run.variant == variant]

    def speeds(self, variant: str, value: Callable[[Speed], T]) -> list[T]:
        """Something about a variant's speed, in each round."""
        return [value(one[variant]) for one in self.rounds]

    def ratios(self, variant: str) -> list[float]:
        """Samples/s of a variant divided by those of the first one, in each round."""
        first = self.variants[0]
        return [one[variant].samples_per_second / one[first].samples_per_second for one in self.rounds]

    def flops_of_run(self, variant: str) -> float | None:
        """Operations of the last stage from its first step to its last; None where no round is complete."""
        if not self.rounds:
            return None
        training = self.rounds[0][variant].recipe["training"]
        per_sample = statistics.median(self.speeds(variant, lambda speed: speed.flops_per_sample))
        return per_sample * training["train_iters"] * training["global_batch_size"]

    def table(self) -> list[list[str]]:
        """The titles, then a row for each variant. Columns of what is not known of any variant are left out."""
        titles = (*TITLES[:2], *self.scores, *TITLES[2:])
        rows = [[variant, *self._score_cells(variant), *self._speed_cells(variant)] for variant in self.variants]
        known = [any(cells) for cells in zip(*rows, strict=True)]
        return [[cell for cell, keep in zip(row, known, strict=True) if keep] for row in (titles, *rows)]

    def _score_cells(self, variant: str) -> list[str]:
        runs = self.of(variant)
        blank = f"{statistics.fmean(run.blank_images for run in runs):.1%}" if runs else ""
        losses = [run.validation_loss for run in runs if run.validation_loss is not None]
        loss = f"{statistics.fmean(losses):.4f}" if losses else ""
        shares = [_shares([run.scores[name] for run in runs]) for name in self.scores]
        return [_shares([run.exact_match for run in runs]), *shares, blank, loss]

    def _speed_cells(self, variant: str) -> list[str]:
        if not self.rounds:
            return [""] * 7
        ratios = self.ratios(variant)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        dispatch = statistics.median(self.speeds(variant, lambda speed: speed.dispatch_share))
        return [
            f"{statistics.median(self.speeds(variant, lambda speed: speed.samples_per_second)):.2f}",
            "1" if variant == self.variants[0] else spread,
            f"{statistics.median(self.speeds(variant, lambda speed: speed.tokens_per_second)):,.0f}",
            f"{statistics.median(self.speeds(variant, lambda speed: speed.flops_per_sample)) / 1e9:,.3f}",
            f"{(self.flops_of_run(variant) or 0.0) / 1e12:,.3g}" if self.runs else "",
            f"{dispatch:.1%}" if dispatch else "",
            f"{max(self.speeds(variant, lambda speed: speed.peak_memory_bytes)) / 2**20:,.0f}",
        ]


def collect_results(comparison: Comparison, chains: Sequence[Chain]) -> Results:
    """Read what the folders of a comparison hold: every finished run and every complete round."""
    variants = list(comparison.variants)
    runs = [_read_run(chain) for chain in chains if is_evaluated(chain)] if comparison.train else []
    rounds = []
    for number in range(1, (comparison.speed.rounds if comparison.speed else 0) + 1):
        files = {variant: round_file(comparison, number, variant) for variant in variants}
        if all(file.exists() for file in files.values()):
            rounds.append({variant: read_speed(file) for variant, file in files.items()})
    return Results(variants, runs, rounds, list(comparison.scores))


def write_results(folder: Path, results: Results) -> None:
    """Write ``results.json`` and ``results.md`` into a folder."""
    speed = {
        variant: {
            "samples_per_second": results.speeds(variant, lambda speed: speed.samples_per_second),
            "ratio": results.ratios(variant),
            "tokens_per_second": results.speeds(variant, lambda speed: speed.tokens_per_second),
            "flops_per_sample": results.speeds(variant, lambda speed: speed.flops_per_sample),
            "flops_per_second": results.speeds(variant, lambda speed: speed.flops_per_second),
            "flops_of_run": results.flops_of_run(variant),
            "expert_shares": results.speeds(variant, lambda speed: speed.expert_shares),
            "peak_memory_bytes": results.speeds(variant, lambda speed: speed.peak_memory_bytes),
            "memory_before_model_bytes": results.speeds(variant, lambda speed: speed.memory_before_model_bytes),
        }
        for variant in results.variants
        if results.rounds
    }
    content = {"runs": [asdict(run) for run in results.runs], "speed": speed}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")


def markdown(results: Results) -> str:
    """The table as Markdown, with how it is to be read."""
    titles, *rows = results.table()
    table = "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *rows))
    return f"{table}\n\n{notes(results)}\n"


def notes(results: Results) -> str:
    """What the table's figures are."""
    parts = []
    if results.runs:
        seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in results.runs}))
        questions = ", ".join(str(count) for count in sorted({run.num_questions for run in results.runs}))
        named = "".join(f", and on {name}" for name in results.scores)
        parts.append(f"Exact match on {questions} questions{named}: mean (each) of seed {seeds}.")
    if results.rounds:
        one = results.rounds[0][results.variants[0]]
        parts.append(
            f"Speed: medians over {len(results.rounds)} round(s) of {len(one.step_seconds)} steps on {one.num_ranks} "
            f"rank(s). Ratio (range): of samples/s to {results.variants[0]} within a round."
        )
        if any(speed.expert_shares for one in results.rounds for speed in one.values()):
            parts.append("Dispatch: share of a step in which tokens are on their way to their experts and back.")
    return " ".join(parts) or "Nothing is finished yet."


def print_results(results: Results) -> None:
    """Print the table."""
    table = Table(title="Comparison", caption=notes(results), box=rich.box.SIMPLE, padding=(0, 1, 0, 0))
    titles, *rows = results.table()
    for title in titles:
        table.add_column(title, no_wrap=title in _NOT_WRAPPED)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _read_run(chain: Chain) -> RunResult:
    folder = chain.last.folder
    score = _read_score(folder)
    validated = [point["lm loss validation"] for point in read_metrics(folder) if "lm loss validation" in point]
    names = ("exact_match", "blank_images", "most_frequent_answer", "num_questions", "by_num_tiles")
    return RunResult(
        chain.variant,
        chain.seed,
        **{name: score[name] for name in names},
        validation_loss=validated[-1] if validated else None,
        scores={one.name: _read_score(one.folder)["exact_match"] for one in chain.scores},
    )


def _read_score(folder: Path) -> dict[str, Any]:
    """What ``megavlm eval`` found."""
    return json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))["score"]


def _shares(values: Sequence[float]) -> str:
    """``50.0% (40.0, 60.0)``: mean, and the single values if there are several."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{100 * value:.1f}' for value in values)})"
