"""Answers questions with a trained model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megavlm.build import Parts
from megavlm.data import Sample, SampleError
from megavlm.evaluation.answer import Answer
from megavlm.evaluation.question import Question
from megavlm.inference.generate import generate
from megavlm.inference.shared import Done, answer_shared


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

    def read(number: int) -> Sample | Done[Answer]:
        question = questions[number]
        try:
            return parts.processor.prompt(question.key, question.conversation).sample
        except SampleError as error:
            problem = f"{error.skipped.reason}: {error.skipped.message}"
            return Done(Answer(number, question.key, problem=problem))

    def answer(prompts: Sequence[tuple[int, Sample]]) -> list[Answer]:
        return _answer(parts, prompts, settings)

    for came in answer_shared(parts, numbers, read, answer, batch_size=settings.batch_size):
        yield [found for _, found in came]


def _answer(parts: Parts, prompts: Sequence[tuple[int, Sample]], settings: AnswerSettings) -> list[Answer]:
    """Answer one batch."""
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
