"""The parts of a model that are converted: as data, as ``model.yaml``, and as the shapes of their weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core import parallel_state

from megavlm.checkpoint.layout import sharded_leaves
from megavlm.checkpoint.release import ReleaseTensor
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.config import Config, load_recipe
from megavlm.data.tokenizers import TokenizerConfig
from megavlm.engines import MegatronEngineConfig
from megavlm.models.backend import BACKENDS
from megavlm.models.config import VLMConfig
from megavlm.models.connectors import AnyConnectorConfig
from megavlm.models.fusion import AnyFusionConfig
from megavlm.models.fusion.decoder_only import DecoderOnlyConfig
from megavlm.models.language import LanguageConfig, LanguageModel, decoder_layer_specs
from megavlm.models.part import part_of
from megavlm.models.vision import AnyVisionConfig
from megavlm.models.vlm import VLM
from megavlm.recipe import Recipe
from megavlm.runtime.fake_world import fake_world
from megavlm.runtime.sharding import sharding_metadata

MODEL_NAME, RECIPE_NAME = "model.yaml", "recipe.yaml"
"""Which of the two a checkpoint holds says whether it was imported or trained."""
EMBEDDING, OUTPUT_LAYER = "language.embedding.word_embeddings.weight", "language.output_layer.weight"
"""Checkpoint keys of the weights that have a row for each token; the second only where it is not the first."""


class ModelParts(Config):
    """A model, or the parts of one that a folder holds."""

    vision: AnyVisionConfig | None = None
    connector: AnyConnectorConfig | None = None
    fusion: AnyFusionConfig | None = None
    language: LanguageConfig | None = None

    @classmethod
    def of(cls, model: VLMConfig) -> "ModelParts":
        """All parts of a model."""
        return cls(vision=model.vision, connector=model.connector, fusion=model.fusion, language=model.decoder)

    @property
    def names(self) -> tuple[str, ...]:
        """Parts with weights that are there."""
        return tuple(name for name in ("vision", "connector", "language") if getattr(self, name) is not None)

    @property
    def is_whole(self) -> bool:
        """Whether it is a model, not a part of one."""
        return len(self.names) == 3

    @property
    def weight_parts(self) -> tuple[str, ...]:
        """First words of :func:`megavlm.models.part.part_of` for all weights: the names, and a whole model's fusion."""
        uses_context = self.is_whole and self.whole().fusion.tile_route.uses_context
        return (*self.names, "cross_attention") if uses_context else self.names

    def only(self, *names: str) -> "ModelParts":
        """The same with no other parts than those."""
        return ModelParts(**{name: getattr(self, name) for name in names})

    def whole(self) -> VLMConfig:
        """As a model, decoder-only if no fusion is named."""
        assert self.vision is not None
        assert self.connector is not None
        assert self.language is not None
        return VLMConfig(
            vision=self.vision,
            connector=self.connector,
            fusion=self.fusion or DecoderOnlyConfig(),
            language=self.language,
        )


class ModelFile(Config):
    """The content of ``model.yaml``: a piece of a recipe, for its ``base:``."""

    model: ModelParts
    tokenizer: TokenizerConfig | None = None

    def dump(self) -> str:
        """As YAML, without what is not there."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def read_model(checkpoint: Path, overrides: Sequence[str] = ()) -> tuple[ModelFile, Recipe | None]:
    """Read what a checkpoint says of its model.

    Args:
        checkpoint: its folder.
        overrides: changes, as on the command line.

    Returns:
        The model, and the recipe of the run that trained it; None for one that was imported.

    Raises:
        ValueError: a file is missing or damaged, or an override does not fit.
    """
    if (checkpoint / MODEL_NAME).is_file():
        return load_recipe(checkpoint / MODEL_NAME, overrides, ModelFile), None
    recipe = load_recipe(checkpoint / RECIPE_NAME, overrides, Recipe)
    return ModelFile(model=ModelParts.of(recipe.model), tokenizer=recipe.tokenizer), recipe


def check_weights(
    weights: CheckpointWeights, parts: ModelParts, remedy: str, *, strange: Sequence[str] = ()
) -> dict[str, ReleaseTensor]:
    """Compare what the parts need with what a checkpoint holds.

    Args:
        weights: of the checkpoint.
        parts: of its model.
        remedy: what to do where they do not fit, for the error.
        strange: parts that the checkpoint must not hold beside those.

    Returns:
        Checkpoint key of each of the parts' weights -> what it is.

    Raises:
        ValueError: a tensor is missing, has another shape, or would be left out; names it.
    """
    shapes = weight_shapes(parts, weights.template(EMBEDDING).shape[0] if EMBEDDING in weights else 1)
    tensors = {}
    for key, wanted in shapes.items():
        if key not in weights:
            raise ValueError(f"{weights.folder}: does not hold {key}. {remedy}")
        template = weights.template(key)
        if tuple(template.shape) != wanted.shape:
            found = tuple(template.shape)
            raise ValueError(f"{weights.folder}: {key} has shape {found}, and the model's has {wanted.shape}. {remedy}")
        tensors[key] = replace(wanted, dtype=template.dtype)
    looked_at = (*parts.weight_parts, *strange)
    extra = [key for key in weights if part_of(key) in looked_at and key not in shapes]
    if extra:
        raise ValueError(f"{weights.folder}: {len(extra)} tensors are not in the model, first {extra[0]}. {remedy}")
    return tensors


def weight_shapes(parts: ModelParts, vocab_size: int) -> dict[str, ReleaseTensor]:
    """Return what the weights of a model's parts are: checkpoint key -> shapes. The dtype stands for any.

    The parts are built on the ``meta`` device, undivided, in a process without a process group.

    Args:
        parts: what to build.
        vocab_size: tokens of the language model, padding not counted.
    """
    with fake_world(world_size=1, rank=0):
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        state = {
            prefix: module.sharded_state_dict(prefix=prefix, metadata=sharding_metadata())
            for prefix, module in _build(parts, vocab_size).items()
        }
        return {
            leaf.key: ReleaseTensor(
                shape=tuple(getattr(leaf.data, "unpadded_shape", leaf.global_shape)),
                padded_shape=tuple(leaf.global_shape),
                dtype=leaf.data.dtype,
            )
            for leaf in sharded_leaves(state)
            if isinstance(leaf.data, torch.Tensor) and leaf.data.is_floating_point()
        }


def _build(parts: ModelParts, vocab_size: int) -> dict[str, Any]:
    """Modules by the prefix of their keys: the whole model, or each part of it alone."""
    settings, backend = MegatronEngineConfig().megatron_settings(), BACKENDS["torch"]
    built: dict[str, Any] = {}
    if parts.is_whole:
        return {"": VLM(parts.whole(), settings, vocab_size=vocab_size, image_token_id=0)}
    if parts.vision is not None:
        built["vision."] = parts.vision.build(settings, backend)
    if parts.connector is not None:
        model = parts.whole()
        built["connector."] = parts.connector.build(
            model.vision.hidden_size,
            model.decoder.hidden_size,
            settings,
            backend,
            num_patches=model.vision.num_patches,
        )
    if parts.language is not None:
        config = parts.language.transformer_config(settings)
        built["language."] = LanguageModel(
            parts.language,
            config,
            decoder_layer_specs(parts.language, config, backend),
            backend,
            vocab_size=vocab_size,
            pre_process=True,
            post_process=True,
        )
    return built
