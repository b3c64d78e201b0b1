"""Reading, merging and validating recipes."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest

from megavlm.config import Config, dump_recipe, load_recipe, merge, save_recipe


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius: pydantic.PositiveFloat = 1.0


class Square(Config):
    kind: Literal["square"] = "square"
    side_length: float = 2.0


class Inner(Config):
    count: int = 3
    names: list[str] = pydantic.Field(default=["a"])
    path: Path | None = None


class Outer(Config):
    shape: Annotated[Circle | Square, pydantic.Field(discriminator="kind")]
    inner: Inner = Inner()
    rate: float = 0.5


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path / "recipe.yaml", "shape: {kind: circle, radius: 2}\ninner: {count: 5}\n")


def test_values_overrides_and_defaults(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["inner.names=[x, y]", "rate=1e-3"], Outer)
    assert (loaded.inner.count, loaded.inner.names, loaded.rate) == (5, ["x", "y"], 0.001)
    assert loaded.shape == Circle(radius=2.0)


def test_saved_recipe_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, ["inner.path=/a/b", "rate=1e-7"], Outer)
    save_recipe(loaded, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml", [], Outer) == loaded
    assert "side_length" not in dump_recipe(loaded)


def test_base_is_relative_to_the_file_and_the_upper_file_wins(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    base = "shape: {kind: square, side_length: 7}\ninner: {count: 1, names: [p, q]}\n"
    write(tmp_path / "models" / "base.yaml", base)
    upper = write(tmp_path / "recipe.yaml", "base: models/base.yaml\ninner: {names: [z]}\n")
    loaded = load_recipe(upper, [], Outer)
    assert loaded.shape == Square(side_length=7.0)
    assert (loaded.inner.count, loaded.inner.names) == (1, ["z"])


def test_another_kind_replaces_the_whole_mapping() -> None:
    lower = {"shape": {"kind": "circle", "radius": 2}}
    assert merge(lower, {"shape": {"kind": "square"}}) == {"shape": {"kind": "square"}}
    assert merge(lower, {"shape": {"radius": 3}}) == {"shape": {"kind": "circle", "radius": 3}}


def test_a_recipe_cannot_be_changed(recipe: Path) -> None:
    loaded = load_recipe(recipe, [], Outer)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        loaded.rate = 2.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inner.cuont=4"], r"inner\.cuont=4: unknown key\. Did you mean 'count'\?"),
        (["inner.zzz=4"], r"inner\.zzz=4: unknown key\. Valid keys here: count, names, path"),
        (["shape.radus=1"], r"shape\.radus=1: unknown key\. Did you mean 'radius'\?"),
        (["shape.kind=circel"], r"shape\.kind='circel': must be one of .*Did you mean 'circle'\?"),
        (["shape.radius=-1"], r"shape\.radius=-1: Input should be greater than 0"),
        (["inner.count=many"], r"inner\.count='many': .*valid integer"),
        (["inner=3"], r"inner=3: "),
        (["rate=.nan"], r"rate=nan: .*finite"),
        (["rate"], r"override='rate': is not of the form key\.path=value"),
        (["a..b=1"], r"override='a\.\.b=1': is not of the form"),
        (["rate=[1"], r"override='rate=\[1': the value is not valid YAML"),
    ],
)
def test_wrong_keys_and_values_are_named(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe, overrides, Outer)


def test_all_problems_are_said_at_once(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"2 problem\(s\)") as caught:
        load_recipe(recipe, ["inner.cuont=4", "rte=3"], Outer)
    assert "inner.cuont" in str(caught.value)
    assert "rte" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list, not a mapping"),
        ("a: [1\n", "is not valid YAML"),
        ("rate: 1\nrate: 2\n", "key 'rate' is given twice"),
        ("base: missing.yaml\n", r"missing\.yaml: no such file \(the base of "),
        ("base: [a, b]\n", "must be the path of one recipe"),
        ("base: recipe.yaml\n", "inherit from each other in a circle"),
        ("rate: 1\n", r"shape: is required and not given"),
        ("shape: {radius: 2}\n", r"shape\.kind: must be one of"),
        ("", "shape: is required"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path / "recipe.yaml", text), [], Outer)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_recipe(tmp_path / "nowhere.yaml", [], Outer)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        load_recipe(tmp_path / "binary.yaml", [], Outer)
    with pytest.raises(ValueError, match="cannot be read"):
        load_recipe(tmp_path, [], Outer)
