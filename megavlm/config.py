"""Reads a recipe, merges its bases and overrides, validates it once, and saves it.

A recipe is a YAML file. ``base:`` names another recipe (relative to the file itself) that it inherits from. On the
command line ``a.b=value`` overrides a key; the value is read as YAML. Merging comes first, validation once at the end,
by the typed class that the caller hands over. This module knows no field of any recipe and imports nothing of the
project.
"""

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import pydantic
import yaml

_BASE_KEY = "base"


class Config(pydantic.BaseModel):
    """Base of every typed piece of a recipe: unknown keys and wrong types are errors, and it cannot be changed."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


ConfigT = TypeVar("ConfigT", bound=Config)


def load_recipe(path: str | Path, overrides: Sequence[str], schema: type[ConfigT]) -> ConfigT:
    """Read a recipe file, apply ``a.b=value`` overrides and validate the whole.

    Args:
        path: the YAML file.
        overrides: ``key.path=value`` strings; the value is YAML (``1e-4``, ``[a, b]``, ``null``, ``text``).
        schema: the class of the whole recipe.

    Raises:
        ValueError: the file cannot be read, an override is malformed, or a key or value is wrong. The message names
            the key, the value and, for a misspelt key, the nearest valid name.
    """
    tree = _read_with_bases(Path(path), seen=())
    for override in overrides:
        tree = merge(tree, _parse_override(override))
    return validate(tree, schema, source=str(path))


def save_recipe(recipe: Config, path: str | Path) -> None:
    """Write a validated recipe as YAML that :func:`load_recipe` reads back to an equal object."""
    Path(path).write_text(dump_recipe(recipe), encoding="utf-8")


def dump_recipe(recipe: Config) -> str:
    """Return the resolved recipe as YAML text, every default spelt out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two recipe trees; ``upper`` wins.

    Mappings merge key by key, anything else is replaced. A mapping whose ``kind`` changes replaces the lower one
    whole, because the fields of one kind mean nothing to another.
    """
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and not _kind_changes(below, value):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def validate(tree: Mapping[str, Any], schema: type[ConfigT], source: str) -> ConfigT:
    """Validate a merged tree.

    Args:
        tree: the merged recipe.
        schema: class to validate by.
        source: named in errors (usually the file).

    Raises:
        ValueError: with one line for each wrong key or value.
    """
    try:
        return schema.model_validate(tree)
    except pydantic.ValidationError as error:
        lines = [_describe(problem, schema) for problem in error.errors()]
        raise ValueError(f"recipe={source}: {len(lines)} problem(s).\n  " + "\n  ".join(lines)) from None


def _kind_changes(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> bool:
    return "kind" in upper and "kind" in lower and upper["kind"] != lower["kind"]


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(str(step) for step in (*seen, resolved))
        raise ValueError(f"base={path}: recipes inherit from each other in a circle ({chain}). Remove one `base:`.")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except FileNotFoundError:
        named_by = f" (the base of {seen[-1]})" if seen else ""
        raise ValueError(f"recipe={path}: no such file{named_by}. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe={path}: cannot be read ({error}).") from None
    except yaml.YAMLError as error:
        raise ValueError(f"recipe={path}: is not valid YAML ({error}).") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"recipe={path}: holds a {type(tree).__name__}, not a mapping of keys. See examples/.")
    base = tree.pop(_BASE_KEY, None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ValueError(f"recipe={path}: base={base!r} must be the path of one recipe.")
    return merge(_read_with_bases(path.parent / base, (*seen, resolved)), tree)


class _RecipeLoader(yaml.SafeLoader):
    """YAML as people write it: ``1e-4`` is a number (plain YAML 1.1 reads a string), a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")):
        raise ValueError(f"override={text!r}: is not of the form key.path=value, e.g. training.seed=7.")
    try:
        tree: Any = yaml.load(value, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"override={text!r}: the value is not valid YAML ({error}).") from None
    for name in reversed(key.split(".")):
        tree = {name: tree}
    return tree


def _describe(problem: Mapping[str, Any], schema: type[Config]) -> str:
    """One line for one pydantic problem: key, value, what is wrong, nearest valid name."""
    key, models = _walk(problem["loc"], schema)
    kind = problem["type"]
    if kind == "extra_forbidden":
        valid = sorted({name for model in models for name in model.model_fields})
        near = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Valid keys here: {', '.join(valid)}."
        return f"{key}={problem['input']!r}: unknown key. {hint}"
    if kind == "missing":
        return f"{key}: is required and not given."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = problem["ctx"].get("tag")
        expected = problem["ctx"].get("expected_tags", "")
        near = difflib.get_close_matches(str(tag), [name.strip(" '") for name in expected.split(",")], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        shown = f"{key}.kind={tag!r}" if tag is not None else f"{key}.kind"
        return f"{shown}: must be one of {expected or 'the known kinds'}.{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error" and "=" in message.split(":")[0]:
        return message
    return f"{key}={problem['input']!r}: {message}." if key else message


def _walk(location: Sequence[str | int], schema: type[Config]) -> tuple[str, list[type[Config]]]:
    """Follow a pydantic error location. Returns the dotted key as the user wrote it, and the classes that hold it."""
    holders: list[type[Config]] = [schema]
    names: list[str] = []
    for position, step in enumerate(location):
        is_last = position == len(location) - 1
        tagged = [model for model in holders if _tag_of(model) == step]
        if tagged and not any(step in model.model_fields for model in holders):
            holders = tagged  # the step is a union's tag, not a key the user wrote
            continue
        names.append(str(step))
        if is_last:
            break
        fields = [model.model_fields[step].annotation for model in holders if step in model.model_fields]
        if fields:
            holders = [model for annotation in fields for model in _models_in(annotation)]
    return ".".join(names), holders


def _tag_of(model: type[Config]) -> str | None:
    field = model.model_fields.get("kind")
    values = typing.get_args(field.annotation) if field else ()
    return values[0] if values else None


def _models_in(annotation: Any) -> list[type[Config]]:
    """All config classes inside a type annotation (through Annotated, unions, lists and dicts)."""
    origin = typing.get_origin(annotation)
    if isinstance(annotation, type) and origin is None:
        return [annotation] if issubclass(annotation, Config) else []
    if origin is Annotated:
        return _models_in(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType, list, tuple, dict):
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return []
