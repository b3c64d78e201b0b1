"""The systems' recipes on real weights: they fit the weights that they start from, and each other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megavlm.build import check_run
from megavlm.config import load_recipe
from megavlm.convert.parts import ModelParts, weight_shapes
from megavlm.convert.recipe_of.dinov2 import dinov2_tree
from megavlm.convert.recipe_of.language import decoder_tree
from megavlm.models.part import part_of
from megavlm.models.taken import moved
from megavlm.models.vision.dual import DualConfig
from megavlm.planning.parameters import build_whole
from megavlm.recipe import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
SYSTEMS = (
    "llava",
    "vila",
    "mm1",
    "mm1_5",
    "points",
    "blip2",
    "minigpt4",
    "mplug_owl",
    "flamingo",
    "vpgtrans",
    "nvlm",
)
DINOV2 = {"image_size": 518, "patch_size": 14, "num_hidden_layers": 12, "hidden_size": 384, "num_attention_heads": 6}
STORIES15M = {
    "num_hidden_layers": 6,
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 32000,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
"""What the published ``config.json`` files say that is no default."""
TOKENIZERS = {"data/real_weights/stories15m": STORIES15M, "data/real_weights/smollm2": SMOLLM2}
CONVERTED = {
    "runs/real_weights/dinov2": "vision",
    "runs/real_weights/stories15m": "language",
    "runs/real_weights/smollm2": "language",
}
TRANSFERRED = "runs/vpgtrans_real/transferred"
"""`megavlm transfer` writes a whole model, whose shapes are those of the recipe that starts from it."""


def is_stage(path: Path) -> bool:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return "train_iters" in tree.get("training", {}) or ("base" in tree and is_stage(path.parent / tree["base"]))


PATHS = [path for path in sorted(EXAMPLES.glob("*/real*.yaml")) if is_stage(path)]
NAMES = [f"{path.parent.name}/{path.stem}" for path in PATHS]


def load(name: str) -> Recipe:
    return load_recipe(EXAMPLES / f"{name}.yaml", [], Recipe)


RECIPES = {name: load(name) for name in NAMES}
BY_RUN = {str(recipe.checkpoint.save): name for name, recipe in RECIPES.items()}


def vocab_size(recipe: Recipe) -> int:
    return TOKENIZERS[str(recipe.tokenizer.path)]["vocab_size"] + 1  # the image placeholder


def sources(recipe: Recipe) -> Iterator[tuple[str, dict[str, str] | None]]:
    """Run folders that a recipe starts from, and what it takes of them (name here -> name there; None: all)."""
    for source in recipe.checkpoint.pretrained_checkpoint:
        yield str(source.path), source.take


def test_every_system_has_one() -> None:
    assert {name.split("/")[0] for name in NAMES} == set(SYSTEMS)
    assert len(BY_RUN) == len(NAMES), "two recipes have one run folder"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_published_models_that_train(name: str) -> None:
    """What `megavlm convert` would read of their config.json; tile size, layer and class token are the recipe's."""
    recipe = RECIPES[name]
    check_run(recipe, world_size=1)
    vision = recipe.model.vision
    encoders: list[Any] = list(vision.encoders) if isinstance(vision, DualConfig) else [vision]
    for encoder in encoders:
        found = encoder.model_dump()
        assert {key: found[key] for key in dinov2_tree(DINOV2)} == dinov2_tree(DINOV2)
        assert encoder.image_size % encoder.patch_size == 0
    if recipe.model.learns_from_pairs:
        return
    published = decoder_tree(TOKENIZERS[str(recipe.tokenizer.path)], "LlamaForCausalLM")
    found = recipe.model.decoder.model_dump()
    del published["vocab_size"]  # the tokenizer's, and one token more
    assert {key: found[key] for key in published if key not in ("kv_channels", "num_query_groups")} == {
        key: value for key, value in published.items() if key not in ("kv_channels", "num_query_groups")
    }
    groups = found["num_query_groups"] or found["num_attention_heads"]
    channels = found["kv_channels"] or found["hidden_size"] // found["num_attention_heads"]
    assert (groups, channels) == (published["num_query_groups"], published["kv_channels"])


def whole_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a recipe's model."""
    recipe = RECIPES[name]
    with build_whole(recipe, vocab_size(recipe)) as model:
        return {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_has_a_source_or_trains(name: str) -> None:
    recipe = RECIPES[name]
    shapes = whole_shapes(name)
    fresh = set(shapes)
    for run, taken in sources(recipe):
        if run == TRANSFERRED:
            fresh.clear()
            continue
        theirs = None if run in CONVERTED else whole_shapes(BY_RUN[run])
        for key, shape in shapes.items():
            there = key if taken is None else moved(key, taken)
            if there is None or (theirs is None and part_of(there) != CONVERTED[run]):
                continue
            if theirs is not None and there in theirs:
                assert theirs[there] == shape, f"{key} of {name} and {there} of {run}"
            if theirs is None or there in theirs:
                fresh.discard(key)
    frozen = [key for key in fresh if key not in recipe.training.trained]
    assert not frozen, f"{name}: start fresh and do not train: {frozen[:3]}"


def test_shapes_are_those_of_the_converted_weights() -> None:
    """The decoder and the encoder of one recipe, built, against what conversion writes for the published files."""
    recipe = RECIPES["llava/real_stage1"]
    published = {
        "vision": {**dinov2_tree(DINOV2), "image_size": 56},
        "language": decoder_tree(STORIES15M, "LlamaForCausalLM"),
    }
    converted = weight_shapes(ModelParts.model_validate(published), vocab_size(recipe))
    ours = weight_shapes(ModelParts.of(recipe.model), vocab_size(recipe))
    assert {key for key in ours if part_of(key) != "connector"} == converted.keys()
    assert {key: ours[key].shape for key in converted} == {key: value.shape for key, value in converted.items()}
    (positions,) = (value for key, value in converted.items() if "position" in key)
    assert 37 * 37 + 1 in positions.shape  # as published, not those of a tile


@pytest.mark.parametrize("name", NAMES)
def test_its_data_are_those_that_fetch_makes(name: str) -> None:
    data = RECIPES[name].data
    made = {"train", "questions", "documents", "words"}
    for config in [getattr(source, "dataset", source) for source in getattr(data.train, "sources", [data.train])]:
        assert config.path.parent == Path("data/real_weights/emoji")
        assert config.path.stem in made
    assert data.valid is not None
    assert data.valid.path.stem in ("valid", "valid_questions")  # those with a file of other images
