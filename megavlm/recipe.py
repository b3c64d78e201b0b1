"""The whole of a run, as data: what a recipe file may say.

Each part's own config stands beside the part; here they come together with what belongs to the run itself, and what
can only be checked on the whole is checked.
"""

from pathlib import Path
from typing import Literal

import pydantic

from megavlm.config import Config
from megavlm.data import DataConfig, TokenizerConfig
from megavlm.engines import AnyEngineConfig, OptimizerSettings
from megavlm.models.vlm import VLMConfig


class OptimizerConfig(OptimizerSettings):
    """AdamW and its learning-rate schedule. Names are Megatron-LM's."""

    lr_warmup_iters: pydantic.NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_decay_iters: pydantic.PositiveInt | None = None
    """Step at which ``min_lr`` is reached; None: the last one."""


class TrainingConfig(Config):
    """One stage of training."""

    trainable: list[Literal["vision", "connector", "cross_attention", "language"]] = pydantic.Field(min_length=1)
    """Parts whose weights change; the others are frozen."""
    train_iters: pydantic.PositiveInt
    """Optimizer steps of the whole stage."""
    global_batch_size: pydantic.PositiveInt
    """Samples of one step, over all ranks."""
    micro_batch_size: pydantic.PositiveInt
    """Samples of one forward pass on one data-parallel rank."""
    seed: pydantic.NonNegativeInt = 1234
    """Of fresh weights, data order and dropout."""
    optimizer: OptimizerConfig
    eval_interval: pydantic.PositiveInt | None = None
    """Steps between validation losses; None: only at the end, if there is validation data."""
    exit_duration_in_mins: pydantic.PositiveFloat | None = None
    """Save and stop after this long; the run can be resumed."""


class CheckpointConfig(Config):
    """Where a run lives, what it starts from, what it keeps. Names are Megatron-LM's."""

    save: Path
    """The run folder: checkpoints, resolved recipe, log, pictures. A run found there is resumed."""
    pretrained_checkpoint: Path | list[Path] | None = None
    """Run folder whose newest weights a fresh run starts from (weights only; optimizer and data start anew), or
    several, loaded in turn: a vision encoder, a language model. A part that none of them holds starts fresh and must
    train."""
    save_interval: pydantic.PositiveInt | None = None
    """Steps between checkpoints; None: only at the end."""
    keep_last: pydantic.PositiveInt = 2
    """Checkpoints kept; older ones are deleted after a new one is complete."""
    async_save: bool = False
    """Write checkpoints in processes beside training."""
    verify: bool = True
    """Compare every file of a checkpoint with its manifest before loading it."""

    @property
    def pretrained_checkpoints(self) -> list[Path]:
        """``pretrained_checkpoint`` as a list."""
        given = self.pretrained_checkpoint
        return [] if given is None else given if isinstance(given, list) else [given]


class LoggingConfig(Config):
    """What a run tells."""

    log_interval: pydantic.PositiveInt = 10
    """Steps between log lines and TensorBoard points."""
    tensorboard: bool = True


class Recipe(Config):
    """A run."""

    model: VLMConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    engine: AnyEngineConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig = LoggingConfig()

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        tokens, room = self.model.tokens_per_tile, self.data.seq_length
        if tokens >= room and self.model.fusion.tile_route.context_tiles != "all":
            raise ValueError(
                f"data.seq_length={room}: holds no whole tile: model.vision and model.connector give {tokens} tokens a "
                "tile. Raise seq_length, or let the connector give fewer tokens."
            )
        self._check_cross_attention_trains()
        optimizer = self.training.optimizer
        if optimizer.min_lr > optimizer.lr:
            raise ValueError(f"training.optimizer.min_lr={optimizer.min_lr}: is above lr={optimizer.lr}. Lower it.")
        if optimizer.lr_warmup_iters >= (optimizer.lr_decay_iters or self.training.train_iters):
            raise ValueError(
                f"training.optimizer.lr_warmup_iters={optimizer.lr_warmup_iters}: the warm-up is not over when the "
                f"decay ends at step {optimizer.lr_decay_iters or self.training.train_iters}. Shorten it."
            )
        return self

    def _check_cross_attention_trains(self) -> None:
        trainable, kind = self.training.trainable, self.model.fusion.kind
        has_cross_attention = bool(self.model.cross_attention_layers)
        if trainable == ["cross_attention"] and not has_cross_attention:
            raise ValueError(
                f"training.trainable={trainable}: model.fusion.kind={kind} has none, so nothing would train. Choose "
                "another fusion or other parts."
            )
        starts_closed = has_cross_attention and not self.checkpoint.pretrained_checkpoints
        if starts_closed and "cross_attention" not in trainable:
            raise ValueError(
                f"training.trainable={trainable}: the cross-attention of model.fusion.kind={kind} starts untrained and "
                "would stay so. Add cross_attention, or start from trained weights (checkpoint.pretrained_checkpoint)."
            )
