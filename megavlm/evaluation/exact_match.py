"""Exact match on a dataset of conversations: the generated answer equals the reference after trimming blanks.

Beside the model's score stand two blind ones, which show what the questions give away without the image:
``blank images`` is the same model on black tiles, ``most frequent answer`` is the best constant answer to each
question text, chosen on the training data.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from megavlm.build import Parts
from megavlm.data import Prompt, SampleError
from megavlm.data.conversation import Conversation
from megavlm.data.datasets import Dataset
from megavlm.inference.generate import generate
from megavlm.runtime.log import LOGGER


@dataclass(frozen=True)
class Answer:
    """One question of the evaluation."""

    key: str
    question: str
    reference: str
    answer: str
    answer_to_blank: str
    """What the model says when every tile is black."""
    images: list[str]
    """Paths of the question's images."""
    num_tiles: int

    @property
    def is_right(self) -> bool:
        """Whether the answer equals the reference."""
        return self.answer.strip() == self.reference.strip()


@dataclass(frozen=True)
class Score:
    """Shares of questions answered exactly, between 0 and 1."""

    exact_match: float
    blank_images: float
    most_frequent_answer: float
    num_questions: int
    num_unusable: int
    """Rows that gave no prompt (unreadable image, too long); not in the other figures."""
    by_num_tiles: dict[int, tuple[float, int]]
    """Tiles of a question -> exact match and number of questions."""


def evaluate(parts: Parts, *, limit: int | None, batch_size: int, max_new_tokens: int) -> tuple[Score, list[Answer]]:
    """Answer every question of the recipe's validation data. All ranks call it; all get the same result.

    Args:
        parts: with a wrapped model.
        limit: most questions; None: all.
        batch_size: questions at a time on each data-parallel rank.
        max_new_tokens: most tokens per answer.

    Raises:
        ValueError: the recipe names no validation data, or none of it is usable.
    """
    if parts.recipe.data.valid is None:
        raise ValueError("data.valid=None: there is nothing to evaluate on. Name a dataset.")
    dataset = parts.recipe.data.valid.build()
    size, rank = parts.engine.data_parallel_size, parts.engine.data_parallel_rank
    rows = range(min(len(dataset), limit or len(dataset)))
    mine, num_unusable = _answer_rows(parts, dataset, rows[rank::size], batch_size, max_new_tokens)
    gathered = parts.engine.gather_over_replicas((mine, num_unusable))
    answers = sorted((answer for share, _ in gathered for answer in share), key=lambda answer: answer[0])
    if not answers:
        raise ValueError(f"data.valid={parts.recipe.data.valid.path}: none of its {len(rows)} rows gives a prompt.")
    return (
        _score(
            [answer for _, answer in answers],
            _most_frequent_answers(parts.recipe.data.train.build()),
            num_unusable=sum(count for _, count in gathered),
        ),
        [answer for _, answer in answers],
    )


def write_results(folder: Path, score: Score, answers: Sequence[Answer]) -> Path:
    """Write ``evaluation.json`` (the score and every answer) into a folder."""
    path = folder / "evaluation.json"
    content = {"score": asdict(score), "answers": [asdict(answer) | {"right": answer.is_right} for answer in answers]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _answer_rows(
    parts: Parts, dataset: Dataset, rows: Sequence[int], batch_size: int, max_new_tokens: int
) -> tuple[list[tuple[int, Answer]], int]:
    """Answer some rows of the dataset, with and without their images."""
    answers: list[tuple[int, Answer]] = []
    num_unusable = 0
    for start in range(0, len(rows), batch_size):
        prompts: list[tuple[int, Conversation, Prompt]] = []
        for row in rows[start : start + batch_size]:
            key, conversation = dataset[row]
            try:
                prompts.append((row, conversation, parts.processor.prompt(key, conversation)))
            except SampleError as error:
                LOGGER.warning("no prompt: %s", error, extra={"any_rank": True})
                num_unusable += 1
        if not prompts:
            continue
        samples = [prompt.sample for _, _, prompt in prompts]
        blank = [replace(sample, tiles=torch.zeros_like(sample.tiles)) for sample in samples]
        seen = generate(parts, samples, max_new_tokens=max_new_tokens)
        unseen = generate(parts, blank, max_new_tokens=max_new_tokens)
        for (row, conversation, prompt), ids, blank_ids in zip(prompts, seen, unseen, strict=True):
            answers.append(
                (
                    row,
                    Answer(
                        key=prompt.sample.key,
                        question=_question(conversation),
                        reference=prompt.reference_answer,
                        answer=parts.tokenizer.decode(ids),
                        answer_to_blank=parts.tokenizer.decode(blank_ids),
                        images=[image.source for image in conversation.images],
                        num_tiles=prompt.sample.tiles.shape[0],
                    ),
                )
            )
    return answers, num_unusable


def _question(conversation: Conversation) -> str:
    """The text of the last user turn."""
    users = [message for message in conversation.messages if message.role == "user"]
    return users[-1].text.strip()


def _most_frequent_answers(dataset: Dataset) -> dict[str, str]:
    """The most frequent reference of each question text of a dataset."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in range(len(dataset)):
        _, conversation = dataset[row]
        counts[_question(conversation)][conversation.messages[-1].text.strip()] += 1
    return {question: answers.most_common(1)[0][0] for question, answers in counts.items()}


def _score(answers: Sequence[Answer], frequent: dict[str, str], num_unusable: int) -> Score:
    by_tiles: dict[int, list[bool]] = defaultdict(list)
    for answer in answers:
        by_tiles[answer.num_tiles].append(answer.is_right)
    return Score(
        exact_match=_share(answer.is_right for answer in answers),
        blank_images=_share(answer.answer_to_blank.strip() == answer.reference.strip() for answer in answers),
        most_frequent_answer=_share(frequent.get(answer.question) == answer.reference.strip() for answer in answers),
        num_questions=len(answers),
        num_unusable=num_unusable,
        by_num_tiles={tiles: (_share(right), len(right)) for tiles, right in sorted(by_tiles.items())},
    )


def _share(flags: Iterable[bool]) -> float:
    listed = list(flags)
    return sum(listed) / len(listed)
