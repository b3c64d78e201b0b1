"""Puts a recipe's parts together: tokenizer, engine, this rank's share of the model.

Training, evaluation and generation all start here, so that they cannot disagree on what a recipe means.
"""

from dataclasses import dataclass

import torch

from megavlm.data import SampleProcessor
from megavlm.data.tokenizers import Tokenizer
from megavlm.engines import DeepSpeedEngineConfig, MegatronEngine, Stage, build_engine
from megavlm.engines.fp8 import check_sides
from megavlm.models.blip2 import QFormerTextConfig
from megavlm.models.config import model_vocab_size
from megavlm.models.products import product_sides
from megavlm.models.vlm import VLM
from megavlm.recipe import Recipe
from megavlm.runtime.layout import NothingSplit, check_parallel_config
from megavlm.runtime.seed import set_seed


@dataclass(frozen=True)
class Parts:
    """What a run works with, on this rank."""

    recipe: Recipe
    tokenizer: Tokenizer
    processor: SampleProcessor
    engine: MegatronEngine

    @property
    def vocab_size(self) -> int:
        """Tokens of the model, padding not counted."""
        return model_vocab_size(self.recipe.model.language, self.tokenizer.vocab_size)

    @property
    def pad_multiple(self) -> int:
        """Rows of a batch are padded to a multiple of this, for sequence parallelism and FP8."""
        return self.recipe.engine.pad_multiple

    def build_chunk(self, stage: Stage) -> VLM:
        """Make the model chunk of one place in the pipeline; its weights hold nothing yet."""
        return VLM(
            self.recipe.model,
            self.recipe.engine.megatron_settings(),
            vocab_size=self.tokenizer.vocab_size,
            image_token_id=self.tokenizer.image_token_id,
            pre_process=stage.pre_process,
            post_process=stage.post_process,
            vp_stage=stage.vp_stage,
            backend=self.recipe.engine.backend,
            bf16_parts=self.recipe.engine.bf16_parts,
            seed=self.recipe.training.seed,
        )

    def build_chunks(self) -> list[torch.nn.Module]:
        """Make this rank's model chunks."""
        return [self.build_chunk(stage) for stage in self.engine.stages()]


def check_run(recipe: Recipe, world_size: int) -> None:
    """Check everything about a run that can be known before it starts.

    Raises:
        ValueError: the layout, the batch sizes or the vocabulary do not fit, or files are missing. Names each problem.
    """
    language = recipe.model.language
    engine = recipe.engine
    tp = engine.tensor_model_parallel_size
    recipe.model.vision.check_layout(tp)
    if not recipe.model.learns_from_pairs:
        recipe.model.fusion.check_layout(recipe.model.decoder.hidden_size, tp)
    if isinstance(engine, DeepSpeedEngineConfig):
        engine.check_experts(language.num_moe_experts)
    # the text side of a Q-Former is whole on every rank
    divisor = 0 if isinstance(language, QFormerTextConfig) else language.make_vocab_size_divisible_by
    pad = engine.pad_multiple
    check_parallel_config(
        engine,
        NothingSplit() if recipe.model.learns_from_pairs else recipe.model.decoder,
        world_size=world_size,
        micro_batch_size=recipe.training.micro_batch_size,
        global_batch_size=recipe.training.global_batch_size,
        seq_length=-(-recipe.data.seq_length // pad) * pad,
        padded_vocab_size=divisor,
    )
    if recipe.model.learns_from_pairs and recipe.training.micro_batch_size * world_size == tp:
        raise ValueError(
            f"training.micro_batch_size={recipe.training.micro_batch_size}: with 1 data-parallel rank a micro-batch is "
            "1 pair, and the negatives of model.language.kind='qformer_text' are the other pairs of the micro-batch on "
            "all data-parallel ranks. Raise it, or start more processes."
        )
    if engine.active_fp8 is not None:
        check_sides(engine.active_fp8, product_sides(recipe.model, tp))


def build_processor(recipe: Recipe) -> SampleProcessor:
    """Load the tokenizer and make the sample processor around it.

    Raises:
        ValueError: the tokenizer cannot be read, or does not fit the model or the chat template.
    """
    tokenizer = recipe.tokenizer.build()
    model_vocab_size(recipe.model.language, tokenizer.vocab_size)
    return SampleProcessor(
        recipe.data,
        tokenizer,
        tile_size=recipe.model.vision.image_size,
        tokens_per_tile=recipe.model.tokens_per_tile,
        route=recipe.model.fusion.tile_route,
        pairs_only=recipe.model.learns_from_pairs,
    )


def build_parts(recipe: Recipe, *, world_size: int) -> Parts:
    """Check a run, load its tokenizer, make its sample processor and start its engine.

    The default process group must exist (:func:`megavlm.runtime.process.process`).
    """
    check_run(recipe, world_size)
    processor = build_processor(recipe)
    engine = build_engine(recipe.engine)
    engine.start()
    set_seed(recipe.training.seed)
    return Parts(recipe, processor.tokenizer, processor, engine)
