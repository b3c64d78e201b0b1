"""The Q-Former's text side and the three losses of BLIP-2's first stage. Shape letters as in ``pair.py``; V tokens of
the vocabulary, E width of the contrast, M trained tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.batch import Batch
from megavlm.models.backend import Backend
from megavlm.models.blip2 import negative
from megavlm.models.blip2.loss import contrast_loss, matching_loss
from megavlm.models.blip2.pair import (
    Pairs,
    contrast_and_caption_mask,
    find_pairs,
    matching_mask,
    places_in_captions,
)
from megavlm.models.connectors.layers import layer_norm, learned, linear
from megavlm.models.connectors.qformer import QFormer
from megavlm.models.weights import start_at

_LEAST_TEMPERATURE = 0.001
_CLASS, _DECODE = 0, 1
"""Start tokens: of captions that are compared or judged, of captions that are written."""


@dataclass(frozen=True)
class TextSizes:
    """What the text side is built by: its config, and what connector and tokenizer add."""

    width: int
    """Of the Q-Former."""
    vocab_size: int
    max_positions: int
    contrast_size: int
    temperature: float
    label_smoothing: float


class PairLosses(NamedTuple):
    """What :class:`QFormerText` computes of a micro-batch."""

    tokens: Tensor
    """``[N, S]`` float32: captioning (ITG), 0 where nothing is trained."""
    rows: Tensor
    """``[N, 2]`` float32: contrast (ITC) and matching (ITM), 0 in rows that are no pairs."""


class QFormerText(MegatronModule):
    """Embeddings, heads and losses, whole on every tensor-parallel rank. The layers are the connector's.

    The start tokens are no tokens of the tokenizer, so that any tokenizer will do. BLIP-2's are BERT's [CLS] and an
    added [DEC], rows of its vocabulary.
    """

    LOSS_NAMES = ("caption", "contrast", "matching")
    """Of :attr:`PairLosses.tokens`, then of the columns of :attr:`PairLosses.rows`."""

    def __init__(
        self,
        sizes: TextSizes,
        config: TransformerConfig,
        backend: Backend,
        *,
        image_token_id: int,
        seed: int,
    ) -> None:
        """Make the module.

        Args:
            sizes: of the text side.
            config: see :func:`megavlm.models.connectors.layers.replicated_config`.
            backend: where the norm comes from.
            image_token_id: the placeholder of image features.
            seed: of the choice of negatives.
        """
        super().__init__(config)
        self.image_token_id = image_token_id
        self.seed = seed
        self.label_smoothing = sizes.label_smoothing
        self.word_embeddings = learned(config, sizes.vocab_size, sizes.width)
        self.start_embeddings = learned(config, 2, sizes.width)
        self.position_embeddings = learned(config, sizes.max_positions, sizes.width)
        self.image_projection = linear(config, sizes.width, sizes.contrast_size, bias=True)
        self.text_projection = linear(config, sizes.width, sizes.contrast_size, bias=True)
        self.temperature = start_at(learned(config, 1), sizes.temperature)
        self.matching_head = linear(config, sizes.width, 2, bias=True)
        self.caption_transform = linear(config, sizes.width, sizes.width, bias=True)
        self.caption_norm = layer_norm(config, backend, sizes.width)
        self.caption_bias = start_at(learned(config, sizes.vocab_size), 0.0)
        self.register_buffer("num_micro_batches", torch.zeros(1, dtype=torch.int64))
        """Trained on before by each data-parallel rank: where the random numbers of the negatives go on."""

    def forward(self, qformer: QFormer, features: Tensor, batch: Batch) -> PairLosses:
        """Compute the three losses of a micro-batch. Collective over the data-parallel ranks.

        Args:
            qformer: the connector, built with ``has_text``.
            features: ``[T, P, D]`` of the batch's tiles.
            batch: the micro-batch: one tile and one caption in each row.

        Raises:
            ValueError: a row is no pair, a caption is too long, or training has one pair only, so no negatives.
        """
        pairs = find_pairs(batch, self.image_token_id, qformer.queries.shape[0])
        pairs = pairs.padded_to(negative.longest_of_replicas(pairs.text.shape[1], pairs.text.device))
        self._check_length(pairs.text.shape[1])
        features = pairs.spread(features)
        images, texts, to_write = self._compare_and_write(qformer, features, pairs)
        contrast, similarities = self._contrast(images, texts, pairs)
        matching = self._match(qformer, features, pairs, *similarities)
        return PairLosses(self._caption(to_write, batch), torch.stack([contrast, matching], dim=1))

    def embed_images(self, qformer: QFormer, features: Tensor) -> Tensor:
        """Image features ``[T, P, D]`` -> queries to compare captions with, ``[T, K, E]`` float32 of length 1."""
        return _normalised(self.image_projection(qformer.read(features)))

    def embed_texts(self, qformer: QFormer, batch: Batch) -> Tensor:
        """Captions of a batch's rows -> ``[N, E]`` float32 of length 1.

        Raises:
            ValueError: a row is no pair, or a caption is too long.
        """
        pairs = find_pairs(batch, self.image_token_id, qformer.queries.shape[0])
        self._check_length(pairs.text.shape[1])
        states = qformer.run_layers(self._embed(_CLASS, pairs.text), None, matching_mask(0, pairs.is_text))
        return _normalised(self.text_projection(states[:, 0]))

    def judge(self, qformer: QFormer, features: Tensor, text: Tensor, is_text: Tensor) -> Tensor:
        """Say whether images and captions belong together: the mean over the queries, ``[N, 2]`` float32.

        Args:
            qformer: the connector.
            features: ``[N, P, D]``.
            text: ``[N, L]`` int64.
            is_text: ``[N, L]`` bool, False behind the end.
        """
        num_queries = qformer.queries.shape[0]
        queries = qformer.queries.expand(text.shape[0], -1, -1)
        states = torch.cat([queries, self._embed(_CLASS, text)], dim=1)
        states = qformer.run_layers(states, features, matching_mask(num_queries, is_text))
        return self.matching_head(states[:, :num_queries]).mean(dim=1).float()

    def _check_length(self, length: int) -> None:
        most = self.position_embeddings.shape[0] - 1
        if length > most:
            raise ValueError(
                f"model.language.max_position_embeddings={most + 1}: a caption has {length} tokens, and {most} fit "
                "behind the start token. Raise it, or lower data.seq_length."
            )

    def _embed(self, start: int, text: Tensor) -> Tensor:
        """``[N, L]`` -> ``[N, 1 + L, D]``: words behind a start token, with positions."""
        words = F.embedding(text, self.word_embeddings)
        states = torch.cat([self.start_embeddings[start].expand(text.shape[0], 1, -1), words], dim=1)
        return states + self.position_embeddings[: states.shape[1]]

    def _compare_and_write(self, qformer: QFormer, features: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """One pass for contrast and captions: they differ in what sees what, not in the queries.

        Returns:
            Images ``[N, K, E]`` and captions ``[N, E]`` to compare, states ``[N, L, D]`` that predict the captions.
        """
        num_queries, length = qformer.queries.shape[0], pairs.text.shape[1]
        queries = qformer.queries.expand(pairs.text.shape[0], -1, -1)
        to_compare, to_write = self._embed(_CLASS, pairs.text), self._embed(_DECODE, pairs.text[:, :-1])
        states = qformer.run_layers(
            torch.cat([queries, to_compare, to_write], dim=1),
            features,
            contrast_and_caption_mask(num_queries, pairs.is_text),
        )
        queries, to_compare, to_write = states.split([num_queries, length + 1, length], dim=1)
        images = _normalised(self.image_projection(queries))
        return images, _normalised(self.text_projection(to_compare[:, 0])), to_write

    def _contrast(self, images: Tensor, texts: Tensor, pairs: Pairs) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Contrast of this rank's pairs with all ranks'.

        Returns:
            Losses ``[N]``; similarities ``[N, W]`` of images to captions, and of captions to images.
        """
        is_pair = negative.gather_rows(pairs.is_pair.to(torch.int64)) > 0
        temperature = self._temperature()
        to_texts = similarity(images, negative.gather_rows(texts)) / temperature
        to_images = similarity(negative.gather_rows(images), texts).t() / temperature
        targets = self._own_columns(texts.shape[0], texts.device)
        losses = [contrast_loss(one, targets, is_pair, self.label_smoothing) for one in (to_texts, to_images)]
        return torch.stack(losses).mean(0), (to_texts, to_images)

    def _match(self, qformer: QFormer, features: Tensor, pairs: Pairs, to_texts: Tensor, to_images: Tensor) -> Tensor:
        """Matching of this rank's pairs, each with a hard negative image and a hard negative caption: ``[N]``."""
        num_rows = pairs.text.shape[0]
        is_pair = negative.gather_rows(pairs.is_pair.to(torch.int64)) > 0
        own = self._own_columns(num_rows, is_pair.device)
        has_negatives = is_pair.sum() > 1
        if self.training and not bool(has_negatives):
            raise ValueError(
                f"training.micro_batch_size={num_rows}: {int(is_pair.sum())} of the {is_pair.shape[0]} rows of this "
                "micro-batch on all data-parallel ranks are pairs, so there are no negatives. Raise it, or mend the "
                "data."
            )
        numbers = self._draw(is_pair.shape[0])[:, own.cpu()]
        allowed = is_pair & (torch.arange(is_pair.shape[0], device=own.device) != own.unsqueeze(1))
        images = negative.gather_rows(features)[negative.choose(to_images, allowed, numbers[0])]
        captions = negative.choose(to_texts, allowed, numbers[1])
        text = negative.gather_rows(pairs.text)[captions]
        is_text = negative.gather_rows(pairs.is_text.to(torch.int64))[captions] > 0
        logits = self.judge(
            qformer,
            torch.cat([features, images, features]),
            torch.cat([pairs.text, pairs.text, text]),
            torch.cat([pairs.is_text, pairs.is_text, is_text]),
        )
        return matching_loss(logits.unflatten(0, (3, num_rows)), pairs.is_pair, has_negatives)

    def _caption(self, states: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the trained tokens, ``[N, S]``: 0 elsewhere, and always part of the graph."""
        places = places_in_captions(batch, self.image_token_id)
        if places.shape[0] == 0:
            places = places.new_zeros(1, 3)
        rows, positions, numbers = places.unbind(1)
        chosen = F.gelu(self.caption_transform(states[rows, numbers]))
        logits = F.linear(self.caption_norm(chosen), self.word_embeddings, self.caption_bias).float()
        losses = F.cross_entropy(
            logits, batch.labels[rows, positions], reduction="none", label_smoothing=self.label_smoothing
        )
        scattered = torch.zeros(batch.labels.shape, dtype=losses.dtype, device=losses.device)
        return scattered.index_put((rows, positions), losses) * (batch.loss_mask != 0)

    def _temperature(self) -> Tensor:
        """Never below a smallest value; its gradient passes all the same, so that it can come back."""
        temperature = self.temperature.float()
        return temperature + (temperature.clamp(min=_LEAST_TEMPERATURE) - temperature).detach()

    def _own_columns(self, num_rows: int, device: torch.device) -> Tensor:
        """Where this rank's rows stand among those of all: ``[N]``."""
        return negative.first_row() * num_rows + torch.arange(num_rows, device=device)

    def _draw(self, num_rows: int) -> Tensor:
        """Random numbers of this micro-batch, ``[2, W]``; in training it is counted."""
        if not self.training:
            return negative.draw_numbers(self.seed, None, num_rows)
        numbers = negative.draw_numbers(self.seed, int(self.num_micro_batches), num_rows)
        self.num_micro_batches += 1
        return numbers


def similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each image's best query with each caption: ``[I, K, E]`` and ``[N, E]`` -> ``[I, N]``."""
    return torch.einsum("ike,ne->ikn", images, texts).amax(dim=1)


def _normalised(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)
