"""What a recipe may say of the parts that train: LoRA, and learning rates of parts."""

from typing import Any

import pytest
from tiny_vlm import TINY

from megavlm.config import validate
from megavlm.models.part import PARTS
from megavlm.recipe import Recipe, TrainingConfig

WITH_LORA = {**TINY, "language": {**TINY["language"], "lora": {}}}


def recipe_of(model: dict[str, Any], engine: str = "megatron", **training: Any) -> Recipe:
    tree = {
        "model": model,
        "tokenizer": {"kind": "huggingface", "path": "nowhere"},
        "data": {"train": {"kind": "jsonl", "path": "nowhere"}, "seq_length": 64},
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
    assert recipe_of(TINY).training.lr_scale == {}


@pytest.mark.parametrize(
    ("model", "training", "message"),
    [
        (TINY, {"trainable": ["lora"]}, r"trainable=\['lora'\]: model\.language\.lora is not given"),
        (WITH_LORA, {"trainable": ["connector"]}, r"trainable=\['connector'\]: LoRA starts at zero and would stay so"),
        (TINY, {"lr_scale": {"vision": 0.1}}, r"lr_scale=\{'vision': 0\.1\}: names vision, and training\.trainable="),
        (TINY, {"lr_scale": {"projector": 0.1}}, r"lr_scale"),
        (TINY, {"lr_scale": {"connector": 0}}, r"lr_scale.*greater than 0"),
    ],
)
def test_parts_that_do_not_train_are_named(model: dict[str, Any], training: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_of(model, **training)


def test_an_engine_of_one_rate_is_named() -> None:
    with pytest.raises(ValueError, match=r"lr_scale=.*: engine\.kind='deepspeed' has one learning rate"):
        recipe_of(TINY, engine="deepspeed", lr_scale={"connector": 2})
