"""The whole of a run, as data: what a recipe file may say.

Each part's own config stands beside the part; here they come together with what belongs to the run itself, and what
can only be checked on the whole is checked.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from megavlm.config import Config
from megavlm.data import DataConfig, TokenizerConfig
from megavlm.engines import AnyEngineConfig, OptimizerSettings
from megavlm.models.blip2 import QFormerTextConfig
from megavlm.models.config import VLMConfig
from megavlm.models.part import Trainable
from megavlm.models.taken import PretrainedConfig

Part = Literal["vision", "connector", "cross_attention", "language", "lora", "text"]
"""As ``megavlm.models.part.PARTS``."""


class OptimizerConfig(OptimizerSettings):
    """AdamW and its learning-rate schedule. Names are Megatron-LM's."""

    lr_warmup_iters: pydantic.NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_decay_iters: pydantic.PositiveInt | None = None
    """Step at which ``min_lr`` is reached; None: the last one."""


class LossSpikeConfig(Config):
    """What to do about a loss far above those before it, or one that is not finite."""

    factor: float = pydantic.Field(2.0, gt=1.0)
    """A loss is a spike if it is more than so many times the median of the last ``window`` losses."""
    window: int = pydantic.Field(64, ge=3)
    """Losses that the median is taken of; spikes count too, so a level that stays high becomes the usual one."""
    min_losses: int = pydantic.Field(16, ge=1)
    """Nothing is a spike before so many losses."""
    action: Literal["warn", "skip", "rewind"] = "warn"
    """``warn`` says it; ``skip`` also leaves the weights as they are; ``rewind`` puts the run back to its newest
    checkpoint and goes on with the data that comes next, so that the samples since then are passed over."""
    max_rewinds: pydantic.PositiveInt = 3
    """A run that would have to go back once more ends with an error."""
    rewind_after_nans: pydantic.PositiveInt = 3
    """With ``rewind``: so many steps in a row whose loss or gradient is not finite also put the run back."""

    @pydantic.model_validator(mode="after")
    def _window_fills(self) -> "LossSpikeConfig":
        if self.min_losses > self.window:
            raise ValueError(
                f"training.loss_spike.min_losses={self.min_losses}: is above window={self.window}, so nothing would "
                "ever be a spike. Lower it."
            )
        return self


class TrainingConfig(Config):
    """One stage of training."""

    trainable: list[Part] = pydantic.Field(min_length=1)
    """Parts whose weights change; the others are frozen."""
    trainable_within: dict[Part, Annotated[list[str], pydantic.Field(min_length=1)] | None] = {}
    """Part of ``trainable`` -> the modules of it that train, while its others are frozen: names below the part, with
    ``*`` and ranges of numbers (``vision: [encoder.layers.42-44]``). None takes back what a base recipe says."""
    lr_scale: dict[Part, pydantic.PositiveFloat] = {}
    """Part -> what its learning rate is multiplied by, from warm-up to ``min_lr``; 1 for those that are not named. None
    takes back what a base recipe says."""
    weight_decay_scale: dict[Part, pydantic.NonNegativeFloat] = {}
    """Part -> what its weight decay is multiplied by, 0 for none; 1 for those that are not named. None as above."""
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
    loss_spike: LossSpikeConfig | None = None
    """Watch for spikes of the loss; None: do not. Steps whose gradients are not finite are always skipped."""
    exit_duration_in_mins: pydantic.PositiveFloat | None = None
    """Save and stop after this long; the run can be resumed."""

    @pydantic.field_validator("lr_scale", "weight_decay_scale", mode="before")
    @classmethod
    def _leave_out_what_is_taken_back(cls, given: Any) -> Any:
        return {part: x for part, x in given.items() if x is not None} if isinstance(given, Mapping) else given

    @property
    def trained(self) -> Trainable:
        """Which parameters train."""
        return Trainable(
            frozenset(self.trainable),
            {str(part): names for part, names in self.trainable_within.items() if names is not None},
        )


class CheckpointConfig(Config):
    """Where a run lives, what it starts from, what it keeps. Names are Megatron-LM's."""

    save: Path
    """The run folder: checkpoints, resolved recipe, log, pictures. A run found there is resumed."""
    pretrained_checkpoint: list[PretrainedConfig] = []
    """Run folder whose newest weights a fresh run starts from (weights only; optimizer and data start anew), or a list
    of several: a vision encoder, a language model. No two may hold the same weights; ``{path: ..., take: [...]}`` takes
    some of a folder, also to another place. What none of them holds starts fresh and must train."""
    save_interval: pydantic.PositiveInt | None = None
    """Steps between checkpoints; None: only at the end."""
    keep_last: pydantic.PositiveInt = 2
    """Checkpoints kept; older ones are deleted after a new one is complete."""
    async_save: bool = False
    """Write checkpoints in processes beside training."""
    verify: bool = True
    """Compare every file of a checkpoint with its manifest before loading it."""
    fall_back: bool = False
    """If the newest checkpoint is damaged, set it aside with a warning and resume from the newest that is not. False:
    the run ends with an error that names that one."""

    @pydantic.model_validator(mode="after")
    def _finds_damage(self) -> "CheckpointConfig":
        if self.fall_back and not self.verify:
            raise ValueError("checkpoint.fall_back=true: checkpoint.verify is false, so no damage is found. Set it.")
        return self

    @pydantic.field_validator("pretrained_checkpoint", mode="before")
    @classmethod
    def _read_one_or_none(cls, given: Any) -> Any:
        return [] if given is None else given if isinstance(given, list) else [given]


class LoggingConfig(Config):
    """What a run tells."""

    log_interval: pydantic.PositiveInt = 10
    """Steps between log lines and TensorBoard points."""
    tensorboard: bool = True
    log_throughput: bool = False
    """Tell the TFLOP/s of a device, as `megavlm plan` and `megavlm bench` count operations: those that the model asks
    for, padding among them, recomputation not."""


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
        self._check_documents_see_images()
        self._check_lora_trains()
        self._check_text_side_trains()
        if self.model.learns_from_pairs:
            self._check_pairs()
        self._check_parts_of_modules_train()
        self._check_scaled_parts_train()
        self._check_rewind_can_be_done()
        optimizer = self.training.optimizer
        if optimizer.min_lr > optimizer.lr:
            raise ValueError(f"training.optimizer.min_lr={optimizer.min_lr}: is above lr={optimizer.lr}. Lower it.")
        if optimizer.lr_warmup_iters >= (optimizer.lr_decay_iters or self.training.train_iters):
            raise ValueError(
                f"training.optimizer.lr_warmup_iters={optimizer.lr_warmup_iters}: the warm-up is not over when the "
                f"decay ends at step {optimizer.lr_decay_iters or self.training.train_iters}. Shorten it."
            )
        return self

    def _check_rewind_can_be_done(self) -> None:
        spike, interval = self.training.loss_spike, self.checkpoint.save_interval
        if spike is None or spike.action != "rewind":
            return
        if self.engine.kind != "megatron":
            raise ValueError(
                f"training.loss_spike.action='rewind': engine.kind={self.engine.kind!r} loads a checkpoint before its "
                "first step only. Choose skip or warn, or engine.kind=megatron."
            )
        if interval is None:
            raise ValueError(
                "training.loss_spike.action='rewind': checkpoint.save_interval is not set, so there would be no "
                f"checkpoint to go back to in {self.training.train_iters} steps. Set it, or choose skip or warn."
            )

    def _check_lora_trains(self) -> None:
        trainable, lora = self.training.trainable, self.model.language.lora
        if "lora" in trainable and lora is None:
            raise ValueError(
                f"training.trainable={trainable}: model.language.lora is not given, so there is no LoRA to train. Give "
                "it, or leave lora out."
            )
        if lora is not None and "lora" not in trainable and not self.checkpoint.pretrained_checkpoint:
            raise ValueError(
                f"training.trainable={trainable}: LoRA starts at zero and would stay so. Add lora, or start from "
                "trained weights (checkpoint.pretrained_checkpoint)."
            )

    def _check_text_side_trains(self) -> None:
        trainable, kind = self.training.trainable, self.model.language.kind
        absent = {"language", "lora"} if self.model.learns_from_pairs else {"text"}
        if named := absent.intersection(trainable):
            raise ValueError(
                f"training.trainable={trainable}: model.language.kind={kind!r} has no "
                f"{' and no '.join(sorted(named))}. Name {'text' if self.model.learns_from_pairs else 'language'} in "
                "its place, or leave it out."
            )
        if self.model.learns_from_pairs and "text" not in trainable and not self.checkpoint.pretrained_checkpoint:
            raise ValueError(
                f"training.trainable={trainable}: the text side of the Q-Former starts untrained and would stay so. "
                "Add text, or start from trained weights (checkpoint.pretrained_checkpoint)."
            )

    def _check_pairs(self) -> None:
        """What the first stage of BLIP-2 asks of data and engine."""
        data, engine, language = self.data, self.engine, self.model.language
        assert isinstance(language, QFormerTextConfig)
        if engine.kind != "megatron" or engine.pipeline_model_parallel_size > 1:
            raise ValueError(
                f"engine.kind={engine.kind!r}, engine.pipeline_model_parallel_size="
                f"{engine.pipeline_model_parallel_size}: the Q-Former and its text side (model.language.kind="
                f"{language.kind!r}) are one pipeline stage of the megatron engine. Set them to megatron and 1; more "
                "ranks can share the data or, by tensor_model_parallel_size, the vision encoder."
            )
        max_tiles = data.tiling.build(self.model.vision.image_size).max_tiles
        wrong = {
            f"packing={data.packing}": (data.packing is not None, "null"),
            f"tiling.kind={data.tiling.kind!r}": (max_tiles > 1, "whole or square"),
            f"tile_tags={data.tile_tags!r}": (data.tile_tags != "none", "none"),
            f"image_wrapper={data.image_wrapper!r}": (data.image_wrapper != "none", "none"),
            f"over_length={data.over_length!r}": (data.over_length == "truncate_images", "skip or truncate_text"),
        }
        for setting, (is_wrong, remedy) in wrong.items():
            if is_wrong:
                raise ValueError(
                    f"data.{setting}: model.language.kind={language.kind!r} learns from pairs: in each row one tile "
                    f"and the tokens of its caption. Set it to {remedy}."
                )
        longest = data.seq_length - self.model.tokens_per_tile
        if longest + 1 > language.max_position_embeddings:
            raise ValueError(
                f"data.seq_length={data.seq_length}: leaves {longest} tokens for a caption, and "
                f"model.language.max_position_embeddings={language.max_position_embeddings} has room for "
                f"{language.max_position_embeddings - 1} behind the start token. Lower it, or raise the positions."
            )

    def _check_parts_of_modules_train(self) -> None:
        training = self.training
        if frozen := sorted(training.trained.within.keys() - set(training.trainable)):
            raise ValueError(
                f"training.trainable_within={training.trainable_within}: names {', '.join(frozen)}, and "
                f"training.trainable={training.trainable}. Add the part there, or leave it out here."
            )

    def _check_scaled_parts_train(self) -> None:
        training = self.training
        scales = {"lr_scale": training.lr_scale, "weight_decay_scale": training.weight_decay_scale}
        for key, of_parts in scales.items():
            if frozen := sorted(of_parts.keys() - set(training.trainable)):
                raise ValueError(
                    f"training.{key}={of_parts}: names {', '.join(frozen)}, and "
                    f"training.trainable={training.trainable}. Train the part, or leave it out."
                )

    def _check_documents_see_images(self) -> None:
        probability, route = self.data.next_image_probability, self.model.fusion.tile_route
        if probability > 0.0 and not (route.uses_context and route.text_sees == "last_image"):
            sees = "" if not route.uses_context else f" with text_sees={route.text_sees!r}"
            raise ValueError(
                f"data.next_image_probability={probability}: is about text that sees one image by cross-attention, and "
                f"the model has model.fusion.kind={self.model.fusion.kind!r}{sees}. Set it to 0, or "
                "model.fusion.text_sees to last_image."
            )

    def _check_cross_attention_trains(self) -> None:
        trainable, kind = self.training.trainable, self.model.fusion.kind
        has_cross_attention = bool(self.model.cross_attention_layers)
        if trainable == ["cross_attention"] and not has_cross_attention:
            raise ValueError(
                f"training.trainable={trainable}: model.fusion.kind={kind} has none, so nothing would train. Choose "
                "another fusion or other parts."
            )
        starts_closed = has_cross_attention and not self.checkpoint.pretrained_checkpoint
        if starts_closed and "cross_attention" not in trainable:
            raise ValueError(
                f"training.trainable={trainable}: the cross-attention of model.fusion.kind={kind} starts untrained and "
                "would stay so. Add cross_attention, or start from trained weights (checkpoint.pretrained_checkpoint)."
            )
