"""What an evaluation is going to do, settled and checked before a model is loaded."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.checkpoint.manifest import MANIFEST_NAME
from megavlm.evaluation.answer import ANSWERS_NAME, AnswerFile
from megavlm.evaluation.answering import AnswerSettings
from megavlm.evaluation.benchmarks import BENCHMARKS, BenchmarkFiles
from megavlm.evaluation.benchmarks.load import load_benchmark
from megavlm.evaluation.held_out import held_out_questions
from megavlm.evaluation.metrics import METRICS, ExactMatch, Metric
from megavlm.evaluation.question import QuestionSet
from megavlm.evaluation.score import check_metric
from megavlm.recipe import Recipe

_DEFAULT_MAX_NEW_TOKENS = 32
# What reads training data or steers its reading changes no answer.
_IRRELEVANT_DATA = {"train", "valid", "shuffle", "num_workers", "worker_timeout_seconds"}


@dataclass(frozen=True)
class EvaluationOptions:
    """What a person asked for."""

    benchmark: str | None = None
    """A key of ``BENCHMARKS``; None: the recipe's held-out conversations."""
    data: Path | None = None
    annotations: Path | None = None
    images: Path | None = None
    """Where images' names begin; None: the folder of ``data``."""
    split: str | None = None
    metric: str | None = None
    """A key of ``METRICS``; None: the benchmark's own."""
    prompt_suffix: str | None = None
    """Put behind each question; None: the benchmark's own."""
    limit: int | None = None
    """Most questions; None: all."""
    batch_size: int = 32
    max_new_tokens: int | None = None
    """None: the benchmark's own."""
    output: Path | None = None
    """Folder of the results; None: in the run folder."""


@dataclass(frozen=True)
class EvaluationPlan:
    """Everything an evaluation needs but the model."""

    questions: QuestionSet
    limit: int
    """Questions to ask: the first so many."""
    metric: Metric
    answering: AnswerSettings
    settings: Mapping[str, Any]
    """What the answers depend on, as JSON has it."""
    output: Path
    is_held_out: bool
    """Whether the questions are the recipe's own, which have blind baselines."""
    answer_file: AnswerFile | None
    """Where answers are kept as they come; None: nowhere, every call starts anew."""


def plan_evaluation(options: EvaluationOptions, checkpoint: Path, recipe: Recipe) -> EvaluationPlan:
    """Read the questions and settle everything else.

    Args:
        options: what was asked for.
        checkpoint: the checkpoint folder, in its run folder.
        recipe: of the checkpoint, with overrides.

    Raises:
        ValueError: an option is wrong or missing, a file is malformed, or the metric cannot score the questions.
    """
    _check(options)
    if options.benchmark is None:
        questions = held_out_questions(recipe)
        metric: Metric = ExactMatch()
        source: dict[str, Any] = {"benchmark": None}
        max_new_tokens = options.max_new_tokens or _DEFAULT_MAX_NEW_TOKENS
        output = options.output or checkpoint.parent
    else:
        benchmark = BENCHMARKS[options.benchmark]
        questions, source = _read_benchmark(options)
        metric = METRICS[options.metric]() if options.metric else benchmark.metric
        max_new_tokens = options.max_new_tokens or benchmark.max_new_tokens
        output = options.output or checkpoint.parent / "evaluation" / options.benchmark / checkpoint.name
    limit = min(len(questions.questions), options.limit or len(questions.questions))
    check_metric(questions.questions[:limit], metric)
    is_held_out = options.benchmark is None
    if is_held_out and recipe.data.valid is not None:
        source["data"] = _fingerprint(recipe.data.valid.path)
    settings = {**source, "max_new_tokens": max_new_tokens, **model_settings(checkpoint, recipe)}
    # the run folder's own evaluation starts anew each time, as training may have gone on
    is_kept = options.benchmark is not None or options.output is not None
    return EvaluationPlan(
        questions,
        limit,
        metric,
        AnswerSettings(max_new_tokens, options.batch_size, with_blank_images=is_held_out),
        settings,
        output,
        is_held_out,
        AnswerFile(output / ANSWERS_NAME, settings) if is_kept else None,
    )


def _check(options: EvaluationOptions) -> None:
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be at least 1.")
    if options.benchmark is None:
        for name in ("data", "annotations", "images", "split", "metric", "prompt_suffix"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')}={value}: belongs to --benchmark. Give one of {', '.join(BENCHMARKS)}."
                )
        return
    if options.data is None:
        raise ValueError(f"--benchmark={options.benchmark}: needs --data, the file with its questions.")
    if options.images is not None and not options.images.is_dir():
        raise ValueError(f"--images={options.images}: is no folder. Give the one that the images' names begin in.")


def _read_benchmark(options: EvaluationOptions) -> tuple[QuestionSet, dict[str, Any]]:
    """The questions, and what they depend on."""
    assert options.benchmark is not None
    assert options.data is not None
    files = BenchmarkFiles(options.data, options.images or options.data.parent, options.annotations, options.split)
    questions = load_benchmark(options.benchmark, files, options.prompt_suffix)
    suffix = BENCHMARKS[options.benchmark].instruction if options.prompt_suffix is None else options.prompt_suffix
    source = {
        "benchmark": options.benchmark,
        "data": _fingerprint(options.data),
        "annotations": None if options.annotations is None else _fingerprint(options.annotations),
        "split": options.split,
        "prompt_suffix": suffix,
    }
    return questions, source


def model_settings(checkpoint: Path, recipe: Recipe) -> dict[str, Any]:
    """What of a run decides its answers; the layout does not.

    Args:
        checkpoint: the checkpoint folder.
        recipe: its recipe, with overrides.
    """
    manifest = checkpoint / MANIFEST_NAME
    tree = recipe.model_dump(mode="json", include={"model", "tokenizer", "data"})
    return {
        "checkpoint": {"name": checkpoint.name, "manifest": _fingerprint(manifest) if manifest.exists() else None},
        "precision": recipe.engine.precision,
        "recipe": {**tree, "data": {key: value for key, value in tree["data"].items() if key not in _IRRELEVANT_DATA}},
    }


def _fingerprint(path: Path) -> str:
    """Name and contents of a file, in short; of a folder of shards, their names and sizes."""
    if path.is_dir():
        listed = "".join(f"{file.name} {file.stat().st_size}\n" for file in sorted(path.rglob("*.tar")))
        return f"{path.name} (sha256 {hashlib.sha256(listed.encode()).hexdigest()[:16]})"
    with path.open("rb") as file:
        return f"{path.name} (sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]})"
