"""A small text model on the real engine, for the tests of checkpoints: build it in a layout, train it, look at it.

Needs a default process group. Shape letters: N rows, S tokens a row.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.batch import Batch
from megavlm.checkpoint.layout import sharded_leaves
from megavlm.engines import MegatronEngine, MegatronEngineConfig, OptimizerSettings, Stage
from megavlm.models.backend import BACKENDS
from megavlm.models.initialization import initialize_weights
from megavlm.models.language import LanguageConfig, LanguageModel, decoder_layer_specs
from megavlm.runtime.log import LOGGER
from megavlm.runtime.seed import set_seed
from megavlm.runtime.sharding import sharding_metadata

VOCAB_SIZE = 50
ROW_LENGTH = 16
GLOBAL_BATCH_SIZE = 4

LANGUAGE = LanguageConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    make_vocab_size_divisible_by=16,
)
SMALLEST = LANGUAGE.model_copy(update={"num_layers": 1})


class TextModel(MegatronModule):
    """The decoder alone, in the engine's contract: a batch in, hidden states or losses ``[N, S]`` out."""

    def __init__(self, language: LanguageConfig, settings: Mapping[str, Any], stage: Stage, vocab_size: int) -> None:
        config = language.transformer_config(settings)
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = stage.pre_process, stage.post_process, stage.vp_stage
        self.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights
        backend = BACKENDS["torch"]
        self.language = LanguageModel(
            language,
            config,
            decoder_layer_specs(language, config, backend),
            backend,
            vocab_size=vocab_size,
            pre_process=stage.pre_process,
            post_process=stage.post_process,
            vp_stage=stage.vp_stage,
        )

    received: Any = None

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        return self.language.shared_embedding_or_output_weight()

    def forward(self, batch: Batch) -> Tensor:
        hidden_states = self.received
        if self.pre_process:
            hidden_states = self.language.embed(batch.tokens, batch.position_ids)
            if torch.is_grad_enabled() and not hidden_states.requires_grad:
                hidden_states.requires_grad_()
            hidden_states = self.language.split_over_sequence(hidden_states)
        hidden_states = self.language(hidden_states, batch.position_ids, None)
        if not self.post_process:
            return hidden_states
        return self.language.token_losses(hidden_states, batch.labels, batch.loss_mask)


def build(
    layout: Mapping[str, Any] | None = None,
    *,
    language: LanguageConfig = LANGUAGE,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 7,
    trains: Callable[[str], bool] = lambda key: True,
    with_optimizer: bool = True,
) -> MegatronEngine:
    """Start an engine in a layout (arguments of MegatronEngineConfig) and give it the model with fresh weights.

    ``trains`` says by checkpoint key which weights change: local names differ between layouts.
    """
    engine = MegatronEngine(MegatronEngineConfig(**(layout or {})))
    engine.start()
    set_seed(seed)
    settings = engine.config.megatron_settings()
    chunks = [TextModel(language, settings, stage, vocab_size) for stage in engine.stages()]
    initialize_weights(chunks, seed)
    for chunk in chunks:
        for leaf in sharded_leaves(chunk.sharded_state_dict(metadata=sharding_metadata())):
            if isinstance(leaf.data, torch.Tensor):
                parameter = leaf.data if leaf.data._base is None else leaf.data._base
                parameter.requires_grad = trains(leaf.key)
    engine.wrap(chunks, training=with_optimizer)
    if with_optimizer:
        engine.build_optimizer(OptimizerSettings(lr=0.02))
    return engine


def train(engine: MegatronEngine, first_step: int, num_steps: int) -> list[float]:
    """Train; step ``i`` sees the same global batch in every layout. Returns the losses, then the last gradient norm."""
    results = [engine.train_step(_batches(engine, step)) for step in range(first_step, first_step + num_steps)]
    return [result.loss for result in results] + [results[-1].grad_norm]


def _batches(engine: MegatronEngine, step: int) -> list[Batch]:
    """This rank's rows of a global batch, in micro-batches of one row."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(VOCAB_SIZE, (GLOBAL_BATCH_SIZE, ROW_LENGTH + 1), generator=generator)
    rows = rows[engine.data_parallel_rank :: engine.data_parallel_size]
    return [
        Batch(
            tokens=row[None, :-1],
            labels=row[None, 1:],
            loss_mask=torch.ones(1, ROW_LENGTH),
            position_ids=torch.arange(ROW_LENGTH)[None],
            cu_seqlens=torch.tensor([0, ROW_LENGTH], dtype=torch.int32),
            tiles=torch.zeros(0, 3, 4, 4, dtype=torch.uint8),
            tiles_per_image=torch.zeros(0, dtype=torch.int64),
            visible_tiles=torch.zeros(1, ROW_LENGTH, 2, dtype=torch.int64),
        )
        for row in rows
    ]


@contextlib.contextmanager
def log_lines() -> Iterator[list[str]]:
    """Collect what the project's log says in the block."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    yield lines
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


def leave() -> None:
    """Undo :func:`build`, so that another layout can be built in the same process group."""
    parallel_state.destroy_model_parallel()
