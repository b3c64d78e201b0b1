"""What a recipe may say of the weights that a run starts from."""

from pathlib import Path
from typing import Any

import pytest

from megavlm.config import dump_recipe, validate
from megavlm.models.taken import PretrainedConfig, lies_in, moved
from megavlm.recipe import CheckpointConfig


def read(given: Any) -> list[PretrainedConfig]:
    return validate({"save": "run", "pretrained_checkpoint": given}, CheckpointConfig, "test").pretrained_checkpoint


@pytest.mark.parametrize(
    ("given", "sources"),
    [
        (None, []),
        ([], []),
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ({"path": "a"}, [("a", None)]),
        ({"path": "a", "take": ["vision", "lora"]}, [("a", {"vision": "vision", "lora": "lora"})]),
        (
            ["a", {"path": "b", "take": {"vision.encoders.1": "vision"}}],
            [("a", None), ("b", {"vision.encoders.1": "vision"})],
        ),
    ],
)
def test_forms(given: Any, sources: list[tuple[str, dict[str, str] | None]]) -> None:
    read_sources = read(given)
    assert [(str(source.path), source.take) for source in read_sources] == sources
    checkpoint = CheckpointConfig(save=Path("run"), pretrained_checkpoint=read_sources)
    assert CheckpointConfig.model_validate(checkpoint.model_dump(mode="json")) == checkpoint
    assert "path: a" in dump_recipe(checkpoint) or not sources


@pytest.mark.parametrize(
    ("take", "message"),
    [
        ("vision", r"pretrained_checkpoint\.0\.take='vision': Input should be a valid dictionary"),
        ([], r"pretrained_checkpoint\.0\.take="),
        (["visoin"], r"'visoin' begins with no part\. Parts are vision, connector"),
        (["vision", "vision"], r"take=\['vision', 'vision'\]: a name is there twice"),
        (["vision", "vision.encoders.0"], r"vision\.encoders\.0 is taken twice"),
        ({"vision.encoders.0": "vision", "vision.encoders.1": "vision"}, r": vision is taken twice.*two entries"),
        ({"vision.a": "vision.x", "vision.b": "vision.x.y"}, r"vision\.x\.y is taken twice"),
        ({"vision": "connector"}, r"connector cannot become vision, which is of another part"),
        (["lora.decoder"], r"'lora\.decoder' is no module\. Name the part lora as a whole"),
        (["vision..x"], r"'vision\.\.x' is no module"),
        (["vision."], r"'vision\.' is no module"),
    ],
)
def test_what_cannot_be_taken_is_named(take: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read({"path": "a", "take": take})


def test_a_misspelt_key_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"pretrained_checkpoint\.1\.tkae=\['vision'\]: unknown key. Did you mean 'take'"
    ):
        read(["b", {"path": "a", "tkae": ["vision"]}])
    with pytest.raises(ValueError, match=r"pretrained_checkpoint\.0\.path=7: Input is not a valid path"):
        read(7)


# key, name, whether it lies there
@pytest.mark.parametrize(
    ("key", "name", "lies"),
    [
        ("vision.encoders.1.class_token", "vision", True),
        ("vision.encoders.1.class_token", "vision.encoders.1", True),
        ("vision.encoders.10.class_token", "vision.encoders.1", False),
        ("connector.queries", "connector.queries", True),
        ("connector.layers.0.text_ffn.up.weight", "connector.layers", False),
        ("connector.layers.0.text_ffn.up.weight", "text", True),
        ("language.decoder.layers.3.cross_attention.gate", "language", False),
        ("language.decoder.layers.3.cross_attention.gate", "cross_attention", True),
        ("language.decoder.layers.3.mlp.linear_fc1.weight", "language.decoder.layers.3", True),
    ],
)
def test_where_a_weight_lies(key: str, name: str, lies: bool) -> None:
    assert lies_in(key, name) == lies


def test_names_elsewhere() -> None:
    names = {"vision.encoders.1": "vision", "connector.mlp": "connector", "lora": "lora"}
    assert moved("vision.encoders.1.class_token", names) == "vision.class_token"
    assert moved("connector.mlp.linear.weight", names) == "connector.linear.weight"
    assert moved("language.decoder.layers.0.lora.q_proj.a", names) == "language.decoder.layers.0.lora.q_proj.a"
    assert moved("vision.encoders.0.class_token", names) is None
    assert moved("vision.class_token", {"vision": "vision.encoders.1"}) == "vision.encoders.1.class_token"
