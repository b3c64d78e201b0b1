"""Counts the parameters of a recipe's model, part by part, without memory for them."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from megatron.core import parallel_state

from megavlm.engines import MegatronEngineConfig
from megavlm.models.part import PARTS
from megavlm.models.vlm import VLM
from megavlm.models.weights import count_parameters
from megavlm.recipe import Recipe
from megavlm.runtime.fake_world import fake_world


def recipe_vocab_size(recipe: Recipe) -> int:
    """Tokens of the recipe's model: as it says, or as many as its tokenizer has.

    Raises:
        ValueError: the tokenizer is needed and cannot be read.
    """
    return recipe.model.language.vocab_size or recipe.tokenizer.build().vocab_size


def count_recipe_parameters(recipe: Recipe, vocab_size: int | None = None) -> Counter[str]:
    """Return parameters per part of the whole model, vocabulary and head padding not counted.

    The model is built on the ``meta`` device, undivided; the recipe's layout does not matter. The tokenizer's
    vocabulary counts unless ``model.language.vocab_size`` is given.

    Args:
        recipe: of the model.
        vocab_size: :func:`recipe_vocab_size`, where it is known already.

    Raises:
        ValueError: the tokenizer is needed and cannot be read.
    """
    vocab_size = recipe_vocab_size(recipe) if vocab_size is None else vocab_size
    with build_whole(recipe, vocab_size) as model:
        counts = count_parameters([model])
    return Counter({part: counts[part] for part in PARTS if counts[part]})


@contextlib.contextmanager
def build_whole(recipe: Recipe, vocab_size: int) -> Iterator[VLM]:
    """The model of a recipe on the ``meta`` device, undivided: it lives as long as the block.

    Args:
        recipe: of the model.
        vocab_size: :func:`recipe_vocab_size`.
    """
    with fake_world(world_size=1, rank=0):
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        settings = MegatronEngineConfig(precision=recipe.engine.on_any_machine().precision).megatron_settings()
        yield VLM(recipe.model, settings, vocab_size=vocab_size, image_token_id=vocab_size - 1)
