"""Our side's answers: the checkpoint in the engine, on one rank, in float32. Shape letters as in ``output.py``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.batch import Batch
from megavlm.checkpoint import load_checkpoint
from megavlm.checkpoint.layout import sharded_leaves
from megavlm.convert.parts import ModelParts
from megavlm.convert.receipt.output import Answers
from megavlm.convert.receipt.pair import Pair
from megavlm.convert.receipt.probe import Probe, Probes
from megavlm.engines import MegatronEngine, MegatronEngineConfig
from megavlm.models.backend import BACKENDS
from megavlm.models.language import LanguageAlone
from megavlm.models.part import part_of
from megavlm.models.vision import AnyVisionConfig
from megavlm.models.vlm import VLM
from megavlm.runtime.process import process


class _VisionAlone(MegatronModule):
    """A vision encoder under the keys that it has in a whole model."""

    def __init__(self, config: AnyVisionConfig, settings: Mapping[str, Any]) -> None:
        encoder = config.build(settings, BACKENDS["torch"])
        super().__init__(encoder.config)
        self.vision = encoder


def ask_ours(
    pair: Pair, probes: Probes, num_rows: int, dtypes: Mapping[str, torch.dtype], num_new_tokens: int
) -> Answers:
    """Load the checkpoint and run the probes.

    Args:
        pair: the folders.
        probes: the inputs.
        num_rows: tokens of our model, padding not counted; 0 without a language model.
        dtypes: of the published tensors by our keys. Ours are rounded to them first, so that both sides compute from
            the same values.
        num_new_tokens: of the greedy continuations.

    Raises:
        ValueError: the checkpoint cannot be loaded.
    """
    with process():
        engine = MegatronEngine(MegatronEngineConfig())
        engine.start()
        chunk = _build(pair.parts, engine.config.megatron_settings(), num_rows, probes.image_token_id)
        engine.wrap([chunk], training=False)
        others = tuple(key for key in pair.weights if part_of(key) not in pair.parts.weight_parts)
        load_checkpoint(pair.checkpoint, engine, with_optimizer=False, verify=False, allow_unexpected=others)
        _round(engine, dtypes)
        if pair.parts.language is None:
            return _encode(engine, chunk, probes.probes)
        outputs, continuations = [], []
        uses_context = "cross_attention" in pair.parts.weight_parts
        for probe in probes.probes:
            tokens, chosen = probe.tokens, list[int]()
            for _ in range(num_new_tokens):
                logits = _logits(engine, probe, tokens, num_rows, uses_context)[:, : probes.vocab_size]
                if not chosen:
                    outputs.append(logits.clone())
                if probes.image_token_id >= 0:
                    logits[-1, probes.image_token_id] = -torch.inf  # no image stands behind a placeholder of text
                chosen.append(int(logits[-1].argmax()))
                tokens = torch.cat([probe.tokens, torch.tensor(chosen)])
            continuations.append(chosen)
        return Answers(outputs, continuations)


def _build(parts: ModelParts, settings: Mapping[str, Any], num_rows: int, image_token_id: int) -> MegatronModule:
    if parts.is_whole:
        return VLM(parts.whole(), settings, vocab_size=num_rows, image_token_id=image_token_id)
    if parts.language is not None:
        return LanguageAlone(parts.language, settings, num_rows)
    assert parts.vision is not None
    return _VisionAlone(parts.vision, settings)


def _round(engine: MegatronEngine, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round our float32 weights, in place, to what the published folder can hold."""
    for leaf in sharded_leaves(engine.sharded_state_dict(with_optimizer=False)):
        dtype = dtypes.get(leaf.key)
        if dtype is not None and dtype != torch.float32 and isinstance(leaf.data, Tensor):
            with torch.no_grad():
                leaf.data.copy_(leaf.data.to(dtype))


def _encode(engine: MegatronEngine, chunk: MegatronModule, probes: Sequence[Probe]) -> Answers:
    chunk.eval()
    with torch.no_grad():
        features = [chunk.vision(probe.tiles.to(engine.device))[0].detach().cpu() for probe in probes]
    return Answers(features, [[] for _ in probes])


def _logits(engine: MegatronEngine, probe: Probe, tokens: Tensor, num_rows: int, uses_context: bool) -> Tensor:
    """``[S, V]`` of one row. New tokens see what the last of the probe's sees."""
    row = tokens.unsqueeze(0)
    num_tiles = len(probe.tiles)
    visible = torch.zeros(len(tokens), 2, dtype=torch.int64)
    context, tags = torch.zeros(num_tiles, dtype=torch.int64), torch.zeros(num_tiles, 0, dtype=torch.int64)
    if probe.expansion is not None:
        given = probe.expansion.visible_tiles
        visible = torch.cat([given, given[-1:].expand(len(tokens) - len(given), 2)])
        context, tags = probe.expansion.tile_context, probe.expansion.tile_tags
    batch = Batch(
        tokens=row,
        labels=torch.zeros_like(row),
        loss_mask=torch.zeros(row.shape),
        position_ids=torch.arange(row.shape[1]).unsqueeze(0),
        cu_seqlens=torch.tensor([0, row.shape[1]], dtype=torch.int32),
        tiles=probe.tiles,
        tiles_per_image=torch.tensor([num_tiles] if num_tiles else [], dtype=torch.int64),
        visible_tiles=visible.unsqueeze(0),
        tile_rows=torch.zeros(num_tiles, dtype=torch.int64),
        tile_context=context,
        tile_tags=tags,
        context_length=max(1, int(context.sum())) if uses_context else 0,
    )
    return engine.logits(batch.to(engine.device), torch.ones_like(row), num_rows)
