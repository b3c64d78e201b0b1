"""What a recipe may say of the parts that train: LoRA, and learning rates of parts."""

from typing import Any

import pytest
from tiny_vlm import FLAMINGO, TINY, X

from megavlm.config import validate
from megavlm.models.part import PARTS
from megavlm.recipe import Recipe, TrainingConfig

WITH_LORA = {**TINY, "language": {**TINY["language"], "lora": {}}}


def recipe_of(
    model: dict[str, Any], engine: str = "megatron", data: dict[str, Any] | None = None, **training: Any
) -> Recipe:
    tree = {
        "model": model,
        "tokenizer": {"kind": "huggingface", "path": "nowhere"},
        "data": {"train": {"kind": "jsonl", "path": "nowhere"}, "seq_length": 64, **(data or {})},
        "engine": {"kind": engine},
        "training": {
            "trainable": ["connector", "language"],
            "train_iters": 9,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "optimizer": {"lr": 0.1},
            **training,
        },
        "checkpoint": {"save": "run"},
    }
    return validate(tree, Recipe, "test")


def test_every_part_can_be_named() -> None:
    recipe = recipe_of(WITH_LORA, trainable=[part for part in PARTS if part not in ("cross_attention", "text")])
    assert isinstance(recipe.training, TrainingConfig)
    assert recipe_of(TINY, lr_scale={"connector": 10}).training.lr_scale == {"connector": 10.0}
    assert recipe_of(TINY, lr_scale={"connector": None}).training.lr_scale == {}, "takes back what a base says"
    assert recipe_of(TINY).training.lr_scale == {}


@pytest.mark.parametrize(
    ("model", "training", "message"),
    [
        (TINY, {"trainable": ["lora"]}, r"trainable=\['lora'\]: model\.language\.lora is not given"),
        (WITH_LORA, {"trainable": ["connector"]}, r"trainable=\['connector'\]: LoRA starts at zero and would stay so"),
        (TINY, {"lr_scale": {"vision": 0.1}}, r"lr_scale=\{'vision': 0\.1\}: names vision, and training\.trainable="),
        (TINY, {"lr_scale": {"projector": 0.1}}, r"lr_scale"),
        (TINY, {"lr_scale": {"connector": 0}}, r"lr_scale.*greater than 0"),
        (TINY, {"weight_decay_scale": {"vision": 0}}, r"weight_decay_scale=\{'vision': 0\.0\}: names vision, and"),
        (TINY, {"weight_decay_scale": {"connector": -1}}, r"weight_decay_scale.*greater than or equal to 0"),
    ],
)
def test_parts_that_do_not_train_are_named(model: dict[str, Any], training: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_of(model, **training)


def test_an_engine_that_cannot_go_back_is_named() -> None:
    scales = {"lr_scale": {"connector": 2}, "weight_decay_scale": {"connector": 0}}
    recipe_of(TINY, engine="deepspeed", loss_spike={"action": "skip"}, **scales)
    with pytest.raises(ValueError, match=r"action='rewind': engine\.kind='deepspeed' loads a checkpoint before its"):
        recipe_of(TINY, engine="deepspeed", loss_spike={"action": "rewind"})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TINY, r"next_image_probability=0\.5: .*model\.fusion\.kind='decoder_only'\. Set it to 0"),
        (X, r"next_image_probability=0\.5: .*kind='cross_attention' with text_sees='all_images'\. Set it to 0"),
    ],
)
def test_a_model_whose_text_does_not_see_one_image_is_named(model: dict[str, Any], message: str) -> None:
    training = {"trainable": ["connector", "cross_attention"] if model is X else ["connector"]}
    with pytest.raises(ValueError, match=message):
        recipe_of(model, data={"next_image_probability": 0.5}, **training)
    recipe_of(FLAMINGO, data={"next_image_probability": 0.5}, trainable=["connector", "cross_attention"])
