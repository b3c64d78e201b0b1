"""CIDEr: how much a caption is like those that people wrote, rare words counting more.

Source: Vedantam et al. (arXiv 1411.5726), in the form CIDEr-D of tylin/coco-caption,
pycocoevalcap/cider/cider_scorer.py, which is what papers report as CIDEr: n-grams of 1 to 4 words weighted by count
times log(images / images whose references have the n-gram); for each n the cosine of the two weight vectors, the
caption's weights clipped to the reference's, times exp(-(difference in length)^2 / (2 sigma^2)) with sigma 6; the mean
over n and references, times 10. One item is one image with all its references, and document frequency is counted over
the references of the items scored, so that a score depends on its company: score all images at once, never by parts.

Papers usually print the mean times 100 (120 is 1.2 here). Implementations differ in the words (coco-caption:
Stanford's tokeniser; here: ``caption_tokens``, which lists its differences), in the corpus of the document frequency
(captioning by reinforcement learning often takes the training set's), and in plain CIDEr (ramavedantam/cider), which
neither clips weights nor penalises length. Where a vector has no length (captions of fewer than n words; all images
alike) older copies divide by zero; here, as in salaniz/pycocoevalcap, that similarity is 0. With one image every
weight is log(1) = 0 and coco-caption gives 0 for any caption; here it is an error.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import pydantic

from megavlm.config import Config
from megavlm.evaluation.metrics.caption_tokens import split_caption
from megavlm.evaluation.metrics.item import Item, MetricResult, average

NGram = tuple[str, ...]

_FEWEST_IMAGES = 2


class CIDEr(Config):
    """Similarity to the references' n-grams, from 0 to 10."""

    kind: Literal["cider"] = "cider"
    max_words: int = pydantic.Field(default=4, ge=1)
    """Words of the longest n-gram."""
    sigma: pydantic.PositiveFloat = 6.0
    """Difference in words at which the penalty for length has fallen to exp(-1/2)."""
    highest: ClassVar[float] = 10.0

    def score(self, items: Sequence[Item]) -> MetricResult:
        """Score all items of all ranks: they are the corpus.

        Raises:
            ValueError: there are fewer than two items.
        """
        if len(items) < _FEWEST_IMAGES:
            raise ValueError(
                f"items={[item.key for item in items]}: CIDEr weighs words by how few images have them, which "
                f"needs at least {_FEWEST_IMAGES} images, here are {len(items)}. Score the whole corpus at once."
            )
        references = [[self._count(reference) for reference in item.references] for item in items]
        images_with = Counter(ngram for counts in references for ngram in set().union(*counts))
        rarity = {ngram: math.log(len(items) / images) for ngram, images in images_with.items()}
        rarest = math.log(len(items))
        return average(
            [
                self._score_caption(self._count(item.prediction), counts, lambda ngram: rarity.get(ngram, rarest))
                for item, counts in zip(items, references, strict=True)
            ]
        )

    def _count(self, caption: str) -> Counter[NGram]:
        """Count the n-grams of 1 to ``max_words`` words of a caption."""
        words = split_caption(caption)
        return Counter(
            tuple(words[start : start + size])
            for size in range(1, self.max_words + 1)
            for start in range(len(words) - size + 1)
        )

    def _score_caption(
        self, caption: Counter[NGram], references: Sequence[Counter[NGram]], rarity: Callable[[NGram], float]
    ) -> float:
        """Return ten times the mean similarity to the references, over n-gram sizes and references."""
        said, num_words = self._weigh(caption, rarity), _num_words(caption)
        similarities: list[float] = []
        for reference in references:
            difference = num_words - _num_words(reference)
            penalty = math.exp(-(difference**2) / (2 * self.sigma**2))
            truth = self._weigh(reference, rarity)
            similarities += [penalty * _clipped_cosine(said[size], truth[size]) for size in said]
        return self.highest * sum(similarities) / (self.max_words * len(references))

    def _weigh(self, counts: Counter[NGram], rarity: Callable[[NGram], float]) -> dict[int, dict[NGram, float]]:
        """Return size -> n-gram of that size -> weight."""
        weights: dict[int, dict[NGram, float]] = {size: {} for size in range(1, self.max_words + 1)}
        for ngram, count in counts.items():
            weights[len(ngram)][ngram] = count * rarity(ngram)
        return weights


def _num_words(counts: Counter[NGram]) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 1)


def _clipped_cosine(said: Mapping[NGram, float], truth: Mapping[NGram, float]) -> float:
    """Return the cosine of two weight vectors, ``said`` clipped to ``truth``; 0 where one of them has no length."""
    lengths = math.hypot(*said.values()) * math.hypot(*truth.values())
    if lengths == 0.0:
        return 0.0
    product = sum(min(weight, truth.get(ngram, 0.0)) * truth.get(ngram, 0.0) for ngram, weight in said.items())
    return product / lengths
