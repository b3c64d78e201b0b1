"""Answers questions with a trained model: shared over the data-parallel ranks, prompts of like length together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megavlm.build import Parts
from megavlm.checkpoint.agreement import agreed
from megavlm.data import Sample, SampleError
from megavlm.evaluation.answer import Answer
from megavlm.evaluation.question import Question
from megavlm.inference.generate import generate

# Prompts of so many batches are read together, and sorted by length, so that rows of a batch need little padding.
_BATCHES_AT_ONCE = 4


@dataclass(frozen=True)
class AnswerSettings:
    """How questions are answered: greedily, the first ``max_new_tokens`` tokens."""

    max_new_tokens: int
    batch_size: int = 32
    """Questions at a time on each data-parallel rank."""
    with_blank_images: bool = False
    """Whether to ask again with black tiles."""


def answer_questions(
    parts: Parts, questions: Sequence[Question], numbers: Sequence[int], settings: AnswerSettings
) -> Iterator[list[Answer]]:
    """Answer some of the questions. Collective: all ranks call it, and take everything it yields.

    Args:
        parts: with a wrapped model.
        questions: all of them.
        numbers: which to answer.
        settings: how.

    Yields:
        Answers of all ranks as they come, the same on every rank; a question that gives no prompt gets an answer that
        says why.

    Raises:
        ValueError: a question cannot be read any more; on every rank.
    """
    size, rank = parts.engine.data_parallel_size, parts.engine.data_parallel_rank
    at_once = settings.batch_size * size * _BATCHES_AT_ONCE
    for start in range(0, len(numbers), at_once):
        together = numbers[start : start + at_once]
        prompts: list[tuple[int, Sample]] = []
        unusable: list[Answer] = []
        with agreed("reading questions"):
            prompts, unusable = _read(parts, questions, together[rank::size])
        yield _merged(parts, unusable)
        # longest first: what does not fit into memory fails at once
        prompts.sort(key=lambda prompt: prompt[1].num_tokens, reverse=True)
        largest_share = -(-len(together) // size)  # every rank counts to it: gathering is a collective
        for first in range(0, largest_share, settings.batch_size):
            yield _merged(parts, _answer(parts, prompts[first : first + settings.batch_size], settings))


def _read(
    parts: Parts, questions: Sequence[Question], numbers: Sequence[int]
) -> tuple[list[tuple[int, Sample]], list[Answer]]:
    """Prompts of questions by number, and answers to those that have none."""
    prompts: list[tuple[int, Sample]] = []
    unusable: list[Answer] = []
    for number in numbers:
        question = questions[number]
        try:
            prompts.append((number, parts.processor.prompt(question.key, question.conversation).sample))
        except SampleError as error:
            problem = f"{error.skipped.reason}: {error.skipped.message}"
            unusable.append(Answer(number, question.key, problem=problem))
    return prompts, unusable


def _answer(parts: Parts, prompts: Sequence[tuple[int, Sample]], settings: AnswerSettings) -> list[Answer]:
    """Answer one batch."""
    if not prompts:
        return []
    samples = [sample for _, sample in prompts]
    seen = generate(parts, samples, max_new_tokens=settings.max_new_tokens)
    unseen: Sequence[list[int] | None] = [None] * len(samples)
    if settings.with_blank_images:
        black = [replace(sample, tiles=torch.zeros_like(sample.tiles)) for sample in samples]
        unseen = generate(parts, black, max_new_tokens=settings.max_new_tokens)
    return [
        Answer(
            number,
            sample.key,
            parts.tokenizer.decode(ids),
            None if blind_ids is None else parts.tokenizer.decode(blind_ids),
            num_tiles=sample.tiles.shape[0],
            num_degraded=sample.num_degraded,
            is_cut=len(ids) == settings.max_new_tokens,
        )
        for (number, sample), ids, blind_ids in zip(prompts, seen, unseen, strict=True)
    ]


def _merged(parts: Parts, mine: list[Answer]) -> list[Answer]:
    """The answers of all data-parallel ranks."""
    return sorted(
        (answer for share in parts.engine.gather_over_replicas(mine) for answer in share),
        key=lambda answer: answer.number,
    )
