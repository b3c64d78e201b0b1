"""Generation by the engine that trains, with a key-value cache or without.

Shape letters: N rows, S tokens a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megavlm.batch import Batch
from megavlm.build import Parts
from megavlm.data import Sample, collate
from megavlm.inference.sampling import Sampling, choose
from megavlm.inference.turn_end import TurnEnd
from megavlm.models.cache import KeyValueCache

GREEDY = Sampling()


def generate(
    parts: Parts,
    prompts: Sequence[Sample],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continue prompts until a turn ends.

    All ranks of a model replica must call it with the same arguments.

    Args:
        parts: with a wrapped model.
        prompts: samples that end with the prefix of the assistant's turn; at least one.
        max_new_tokens: most tokens per answer.
        sampling: how tokens are chosen.
        use_cache: keep keys and values instead of running the whole sequence for each token.

    Returns:
        New token ids of each prompt, the end of the turn not included.

    Raises:
        ValueError: the layout is one that a cache does not work with.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for came in stream(parts, prompts, max_new_tokens=max_new_tokens, sampling=sampling, use_cache=use_cache):
        for answer, tokens in zip(answers, came, strict=True):
            answer += tokens
    return answers


def stream(
    parts: Parts,
    prompts: Sequence[Sample],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    use_cache: bool = True,
) -> Iterator[list[list[int]]]:
    """Like :func:`generate`, as tokens come.

    Yields:
        What each prompt's answer gains: mostly a token; none where its turn has ended, or where the last ones may be
        the beginning of the text that ends it. Every rank must take all of them.
    """
    steps: _Cached | _Whole = _Cached(parts, prompts, max_new_tokens) if use_cache else _Whole(parts, prompts)
    streams = sampling.streams(len(prompts))
    stop_token_ids, stop_text = parts.processor.stop_token_ids, parts.processor.stop_text
    ends = [TurnEnd(parts.tokenizer, stop_token_ids, stop_text) for _ in prompts]
    next_tokens: list[int] | None = None
    for _ in range(max_new_tokens):
        next_tokens = choose(steps.logits(next_tokens), sampling, streams)
        yield [end.add(token) for end, token in zip(ends, next_tokens, strict=True)]
        if not any(end.is_open for end in ends):
            return
    yield [end.rest() for end in ends]


class _Whole:
    """Runs the whole sequences for each token."""

    def __init__(self, parts: Parts, prompts: Sequence[Sample]) -> None:
        self._parts = parts
        self._prompts = prompts
        self._texts = [prompt.tokens.tolist() for prompt in prompts]

    def logits(self, tokens: list[int] | None) -> Tensor:
        """Return ``[N, V]`` for the next token, after ``tokens``."""
        for text, token in zip(self._texts, tokens or [], strict=False):
            text.append(token)
        batch = collate(
            [_continued(prompt, text) for prompt, text in zip(self._prompts, self._texts, strict=True)],
            pad_id=self._parts.tokenizer.pad_id,
            tile_size=self._parts.processor.tile_size,
            pad_multiple=self._parts.pad_multiple,
            uses_context=self._parts.processor.route.uses_context,
        )
        is_last = torch.zeros_like(batch.tokens)
        for row, text in enumerate(self._texts):
            is_last[row, len(text) - 1] = 1
        engine = self._parts.engine
        return engine.logits(batch.to(engine.device), is_last, self._parts.vocab_size)


def _continued(prompt: Sample, text: list[int]) -> Sample:
    """The prompt with what was generated so far, which sees what the prompt's last token sees."""
    num_new = len(text) - prompt.num_tokens
    return replace(
        prompt,
        tokens=torch.tensor(text),
        labels=torch.zeros(len(text), dtype=torch.int64),
        loss_mask=torch.zeros(len(text)),
        visible_tiles=torch.cat([prompt.visible_tiles, prompt.visible_tiles[-1:].expand(num_new, 2)]),
    )


class _Cached:
    """Runs the prompts once, padded on the left, and then one token of each row at a time."""

    def __init__(self, parts: Parts, prompts: Sequence[Sample], max_new_tokens: int) -> None:
        engine_config = parts.recipe.engine
        if engine_config.sequence_parallel or engine_config.virtual_pipeline_model_parallel_size:
            raise ValueError(
                f"engine.sequence_parallel={engine_config.sequence_parallel}, virtual_pipeline_model_parallel_size="
                f"{engine_config.virtual_pipeline_model_parallel_size}: generation runs one token at a time, which can "
                "neither be split nor interleaved. Set false and null; checkpoints load all the same."
            )
        self._parts = parts
        self._batch = _padded_on_the_left(parts, prompts)
        length = self._batch.tokens.shape[1]
        num_pads = torch.tensor([length - prompt.num_tokens for prompt in prompts])
        self._cache = KeyValueCache(num_pads.to(parts.engine.device), length + max_new_tokens)
        self._last_visible = self._batch.visible_tiles[:, -1:]

    def logits(self, tokens: list[int] | None) -> Tensor:
        """Return ``[N, V]`` for the next token, after ``tokens``."""
        if tokens is not None:
            self._batch = self._next(torch.tensor(tokens))
        engine = self._parts.engine
        is_last = torch.zeros_like(self._batch.tokens)
        is_last[:, -1] = 1
        logits = engine.logits(self._batch.to(engine.device), is_last, self._parts.vocab_size, self._cache)
        self._cache.advance(self._batch.tokens.shape[1])
        return logits

    def _next(self, tokens: Tensor) -> Batch:
        """The batch of one more token in each row."""
        column = tokens.unsqueeze(1)
        return replace(
            self._batch,
            tokens=column,
            labels=torch.zeros_like(column),
            loss_mask=torch.zeros(column.shape),
            position_ids=torch.zeros_like(column),  # the cache knows them
            cu_seqlens=torch.arange(len(tokens) + 1, dtype=torch.int32),
            tiles=self._batch.tiles[:0],
            visible_tiles=self._last_visible,
        )


def _padded_on_the_left(parts: Parts, prompts: Sequence[Sample]) -> Batch:
    batch = collate(
        prompts,
        pad_id=parts.tokenizer.pad_id,
        tile_size=parts.processor.tile_size,
        uses_context=parts.processor.route.uses_context,
    )
    num_rows, length = batch.tokens.shape
    num_pads = torch.tensor([[length - prompt.num_tokens] for prompt in prompts])
    places = torch.arange(length) - num_pads
    source = places % length  # padding comes from the row's end
    rows = torch.arange(num_rows).unsqueeze(1)
    return replace(
        batch,
        tokens=batch.tokens[rows, source],
        labels=torch.zeros_like(batch.labels),
        loss_mask=torch.zeros_like(batch.loss_mask),
        position_ids=places.clamp(min=0),
        visible_tiles=batch.visible_tiles[rows, source],
        row_lengths=batch.row_lengths[:0],  # counts padding on the right
    )
