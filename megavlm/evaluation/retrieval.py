"""How well images and captions find each other: what a run of BLIP-2's first stage is judged by.

Every held-out image is compared with every held-out caption by the contrast's similarity. (The paper then lets the
matching head judge the 128 best anew; this does not.) Shape letters: N pairs, K queries, E width of the contrast.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megavlm.build import Parts
from megavlm.checkpoint import durable
from megavlm.data import Sample, SampleError, collate
from megavlm.evaluation.held_out import HeldOutQuestions
from megavlm.inference.shared import Done, answer_shared
from megavlm.models.blip2.model import similarity
from megavlm.runtime.log import LOGGER

RANKS = (1, 5, 10)
_IMAGES_AT_ONCE = 64
_NUM_LISTED = 5


@dataclass(frozen=True)
class Retrieval:
    """Shares of images whose caption, and of captions whose image, is among the k nearest."""

    num_pairs: int
    num_captions: int
    """Different ones; the same caption under another image counts as found."""
    image_to_text: Mapping[int, float]
    """k -> share."""
    text_to_image: Mapping[int, float]
    by_chance: Mapping[int, float]
    """k -> what an order drawn by lot would give, in both directions."""
    unusable: tuple[tuple[str, str], ...]
    """Key and reason of rows that are no pairs; in no figure."""


@dataclass(frozen=True)
class _Embedded:
    """One pair."""

    image: Tensor
    """``[K, E]`` float32, on the CPU."""
    text: Tensor
    """``[E]``."""


def retrieve(parts: Parts, *, limit: int | None = None, batch_size: int = 32) -> Retrieval:
    """Compare the held-out pairs of a recipe. Collective: all ranks call it, and all get the same.

    Args:
        parts: with a wrapped model that learned from pairs.
        limit: the first so many rows; None: all.
        batch_size: pairs at a time on each data-parallel rank.

    Raises:
        ValueError: the recipe has no held-out data, or fewer than two usable pairs in it.
    """
    if parts.recipe.data.valid is None:
        raise ValueError("data.valid=None: there is nothing to evaluate on. Name a dataset of images and captions.")
    questions = HeldOutQuestions(parts.recipe.data.valid.build())
    numbers = range(min(len(questions), len(questions) if limit is None else limit))
    [model] = parts.engine.chunks
    model.eval()

    def read(number: int) -> Sample | Done[_Embedded | str]:
        question = questions[number]
        try:
            return parts.processor(question.key, question.conversation)
        except SampleError as error:
            return Done(f"{error.skipped.reason}: {error.skipped.message}")

    def embed(samples: Sequence[tuple[int, Sample]]) -> list[_Embedded | str]:
        batch = collate(
            [sample for _, sample in samples], pad_id=parts.tokenizer.pad_id, tile_size=parts.processor.tile_size
        )
        with torch.no_grad():
            images, texts = model.embed_pairs(batch.to(parts.engine.device))
        return [_Embedded(*pair) for pair in zip(images.cpu(), texts.cpu(), strict=True)]

    came = answer_shared(parts, numbers, read, embed, batch_size=batch_size)
    found = dict(entry for together in came for entry in together)
    unusable = [(questions[number].key, one) for number, one in sorted(found.items()) if isinstance(one, str)]
    for key, problem in unusable[:_NUM_LISTED]:
        LOGGER.warning("is no pair, in no figure: %s: %s", key, problem)
    pairs = {number: one for number, one in sorted(found.items()) if isinstance(one, _Embedded)}
    if len(pairs) < 2:
        raise ValueError(
            f"data.valid={parts.recipe.data.valid.name}: {len(pairs)} of {len(numbers)} rows are pairs of one image "
            "and a caption, and retrieval needs at least 2. Name other data."
        )
    images = torch.stack([pair.image for pair in pairs.values()])
    texts = torch.stack([pair.text for pair in pairs.values()])
    scores = torch.cat([similarity(some, texts) for some in images.split(_IMAGES_AT_ONCE)])
    return judge(scores, [questions[number].references[0].strip() for number in pairs], tuple(unusable))


def judge(scores: Tensor, captions: Sequence[str], unusable: tuple[tuple[str, str], ...] = ()) -> Retrieval:
    """Count what is found.

    Args:
        scores: ``[N, N]`` similarity of each image (row) with each caption.
        captions: of the images; equal ones are one caption.
        unusable: told on.
    """
    names = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    own = torch.tensor([names[caption] for caption in captions])
    belongs = own.unsqueeze(1) == own
    counts = Counter(captions)
    ranks = [k for k in RANKS if k <= len(captions)]

    def recalls(order: Tensor) -> dict[int, float]:
        """``order [N, N]``: what each row finds, best first."""
        found = belongs.gather(1, order)
        return {k: float(found[:, :k].any(1).double().mean()) for k in ranks}

    return Retrieval(
        num_pairs=len(captions),
        num_captions=len(names),
        image_to_text=recalls(scores.argsort(dim=1, descending=True, stable=True)),
        text_to_image=recalls(scores.t().argsort(dim=1, descending=True, stable=True)),
        by_chance={
            k: sum(_chance(len(captions), counts[caption], k) for caption in captions) / len(captions) for k in ranks
        },
        unusable=unusable,
    )


def _chance(num_all: int, num_right: int, num_drawn: int) -> float:
    """Probability that one of ``num_drawn`` out of all is right."""
    return 1.0 - math.comb(num_all - num_right, num_drawn) / math.comb(num_all, num_drawn)


def print_retrieval(retrieval: Retrieval) -> None:
    """Print the table."""
    title = f"retrieval: {retrieval.num_pairs} held-out pairs, {retrieval.num_captions} different captions"
    table = Table("recall x 100", *(f"@{k}" for k in retrieval.by_chance), title=title)
    rows = {
        "image to text": retrieval.image_to_text,
        "text to image": retrieval.text_to_image,
        "by chance": retrieval.by_chance,
    }
    for name, recalls in rows.items():
        table.add_row(name, *(f"{100 * share:.2f}" for share in recalls.values()))
    if retrieval.unusable:
        table.caption = f"{len(retrieval.unusable)} rows are no pairs, in no figure"
    Console().print(table)


def write_retrieval(folder: Path, retrieval: Retrieval, settings: Mapping[str, Any]) -> Path:
    """Write ``evaluation.json``: the recalls, and what they depend on.

    Raises:
        ValueError: the folder cannot be written.
    """
    path = folder / "evaluation.json"
    content = {"name": "retrieval", "score": asdict(retrieval), "settings": dict(settings)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise ValueError(f"--output={folder}: cannot be written ({error}). Choose another.") from None
    return path
