"""Greedy generation, by any layout that trains.

Each new token runs the whole sequence again: right for short answers and for evaluation during development.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megavlm.batch import Batch
from megavlm.build import Parts
from megavlm.data import Sample, collate


def generate(parts: Parts, prompts: Sequence[Sample], *, max_new_tokens: int) -> list[list[int]]:
    """Continue prompts greedily until a turn ends.

    All ranks of a model replica must call it with the same prompts.

    Args:
        parts: with a wrapped model.
        prompts: samples that end with the prefix of the assistant's turn; at least one.
        max_new_tokens: most tokens per answer.

    Returns:
        New token ids of each prompt, the end of the turn not included.
    """
    texts = [prompt.tokens.tolist() for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        batch = _continued(parts, [prompts[row] for row in open_rows], [texts[row] for row in open_rows])
        is_last = torch.zeros_like(batch.tokens)
        for index, row in enumerate(open_rows):
            is_last[index, len(texts[row]) - 1] = 1
        logits = parts.engine.logits(batch.to(parts.engine.device), is_last, parts.vocab_size)
        still_open = []
        for row, token in zip(open_rows, logits.argmax(dim=-1).tolist(), strict=True):
            if token in parts.processor.stop_token_ids:
                continue
            answers[row].append(token)
            texts[row].append(token)
            still_open.append(row)
        open_rows = still_open
        if not open_rows:
            break
    return answers


def _continued(parts: Parts, prompts: Sequence[Sample], texts: Sequence[list[int]]) -> Batch:
    """A batch of the prompts with what was generated so far."""
    samples = []
    for prompt, text in zip(prompts, texts, strict=True):
        num_new = len(text) - prompt.num_tokens
        samples.append(
            replace(
                prompt,
                tokens=torch.tensor(text),
                labels=torch.zeros(len(text), dtype=torch.int64),
                loss_mask=torch.zeros(len(text)),
                visible_tiles=torch.cat([prompt.visible_tiles, prompt.visible_tiles[-1:].expand(num_new, 2)]),
            )
        )
    return collate(
        samples,
        pad_id=parts.tokenizer.pad_id,
        tile_size=parts.processor.tile_size,
        pad_multiple=parts.pad_multiple,
        uses_context=parts.processor.route.uses_context,
    )
