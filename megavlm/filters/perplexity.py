"""Keeps the samples whose text a model finds least surprising, given the image.

Source: POINTS (arXiv 2409.04828): ``exp`` of the mean loss of the text's tokens; the lowest 20 % are kept.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megavlm.build import Parts
from megavlm.checkpoint.agreement import from_rank_0, rank
from megavlm.data import Dataset, Sample, SampleError, collate
from megavlm.filters.report import write_report
from megavlm.filters.score_file import ScoreFile
from megavlm.filters.sharing import Result, in_batches, shared, team_of
from megavlm.filters.source import write_kept
from megavlm.recipe import Recipe

_LARGEST_MEAN_LOSS = 700.0  # exp of more is no number


@dataclass(frozen=True)
class PerplexitySettings:
    """How samples are scored and chosen."""

    keep_share: float = 0.2
    """Of the samples that have a score, those with the lowest are kept."""
    batch_size: int = 8
    """Samples at a time on each data-parallel rank. With another one scores may differ by rounding."""

    def check(self) -> None:
        """Raise ``ValueError`` for numbers out of range."""
        if not 0 < self.keep_share <= 1:
            raise ValueError(f"--keep={self.keep_share}: is the share of the samples to keep, above 0 and at most 1.")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size={self.batch_size}: must be at least 1.")


def filter_by_perplexity(
    parts: Parts,
    dataset: Dataset,
    folder: Path,
    settings: PerplexitySettings,
    scorer: Mapping[str, Any],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[int]:
    """Score every sample, and write ``scores.jsonl``, what is kept, and a report. Collective: all ranks call it.

    Args:
        parts: with a wrapped model, which is not changed.
        dataset: what is filtered.
        folder: where to; goes on with the scores in it.
        settings: how.
        scorer: says which model it is (:func:`describe_scorer`); scores of others are not mixed with its own.
        report: is told how many of how many samples are done.

    Returns:
        Numbers of the samples that are kept, in their order; the same on every rank and for any number of ranks.

    Raises:
        ValueError: the settings are wrong, or the folder holds other scores or cannot be written.
    """
    settings.check()
    team = team_of(parts)
    depends_on = {"filter": "perplexity", "num_samples": len(dataset), "batch_size": settings.batch_size, **scorer}
    file = ScoreFile(folder, depends_on)
    scores = from_rank_0(f"opening {file.path}", file.open)
    batches = in_batches(range(len(dataset)), settings.batch_size, set(scores))
    report(len(scores), len(dataset))
    try:
        for came in shared(batches, lambda some: _read(parts, dataset, some), lambda work: _score(parts, *work), team):
            new = [entry for entry in came if entry["number"] not in scores]
            if rank() == 0:
                file.add(new)
            scores |= {entry["number"]: entry for entry in new}
            report(len(scores), len(dataset))
    finally:
        file.close()
    kept = lowest(scores, settings.keep_share)
    if rank() == 0:
        write_kept(folder, dataset, kept)
        highest = max((scores[number]["score"] for number in kept), default=None)
        extra = {"keep_share": settings.keep_share, "highest_kept": highest, "scorer": dict(scorer)}
        write_report(folder, dataset, scores, set(kept), what="perplexity", is_logarithmic=True, extra=extra)
    return kept


def lowest(scores: Mapping[int, Mapping[str, Any]], share: float) -> list[int]:
    """The numbers with the lowest scores, in order; of equal scores those that come first. At least one, if any."""
    usable = sorted((entry["score"], number) for number, entry in scores.items() if entry.get("score") is not None)
    count = min(len(usable), max(1, math.floor(share * len(usable) + 0.5)))
    return sorted(number for _, number in usable[:count])


def describe_scorer(checkpoint: Path, recipe: Recipe) -> dict[str, Any]:
    """What of a model decides its scores."""
    tree = recipe.model_dump_json(include={"model", "tokenizer", "data"}, exclude={"data": {"train", "valid"}})
    return {
        "checkpoint": f"{checkpoint.parent.name}/{checkpoint.name}",
        "recipe": hashlib.sha256(tree.encode()).hexdigest()[:16],
        "precision": recipe.engine.precision,
    }


def _read(parts: Parts, dataset: Dataset, numbers: Sequence[int]) -> tuple[list[tuple[int, Sample]], list[Result]]:
    """The samples of a batch, and results of those that have none."""
    samples: list[tuple[int, Sample]] = []
    unusable: list[Result] = []
    for number in numbers:
        key = f"row {number}"
        try:
            key, conversation = dataset[number]
            sample = parts.processor(key, conversation)
        except SampleError as error:
            problem = f"{error.skipped.reason}: {error.skipped.message}"
            unusable.append({"number": number, "key": key, "score": None, "problem": problem})
        except ValueError as error:
            unusable.append({"number": number, "key": key, "score": None, "problem": f"row_malformed: {error}"})
        else:
            samples.append((number, sample))
    return samples, unusable


def _score(parts: Parts, samples: list[tuple[int, Sample]], unusable: list[Result]) -> list[Result]:
    """Results of a batch. Ranks of a model replica call it together."""
    if not samples:
        return unusable
    batch = collate(
        [sample for _, sample in samples],
        pad_id=parts.tokenizer.pad_id,
        tile_size=parts.processor.tile_size,
        pad_multiple=parts.pad_multiple,
        uses_context=parts.processor.route.uses_context,
    )
    is_trained = batch.loss_mask > 0
    logits = parts.engine.logits(batch.to(parts.engine.device), is_trained.long(), parts.vocab_size)
    labels = batch.labels[is_trained].to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none").cpu()
    results = list(unusable)
    for (number, sample), loss in zip(samples, losses.split(is_trained.sum(dim=1).tolist()), strict=True):
        mean = float(loss.mean()) if loss.numel() else math.nan
        result: Result = {"number": number, "key": sample.key, "num_tokens": loss.numel()}
        if 0 <= mean < _LARGEST_MEAN_LOSS:
            results.append({**result, "score": math.exp(mean)})
        else:
            results.append({**result, "score": None, "problem": f"no_perplexity: the mean loss is {mean}"})
    return sorted(results, key=lambda entry: entry["number"])
