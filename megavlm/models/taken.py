"""What a run starts from: the weights of another run, or some of them, and where in the model they go."""

from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pydantic

from megavlm.config import Config
from megavlm.models.part import PARTS, part_of

_PREFIXES = frozenset({"vision", "connector", "language"})
"""Parts whose keys begin with their name, so that their modules have names of their own."""


class PretrainedConfig(Config):
    """Weights of a run folder that a fresh run starts from. A recipe may give the folder alone."""

    path: Path
    """The run folder."""
    take: dict[str, str] | None = pydantic.Field(None, min_length=1)
    """What to take of it, as name in this model -> name there: parts, or modules below them (``{vision.encoders.1:
    vision}``); as a list where the names are the same (``[vision, connector.projection]``). None: all of it."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read_folder(cls, given: Any) -> Any:
        return given if isinstance(given, Mapping | PretrainedConfig) else {"path": given}

    @pydantic.field_validator("take", mode="before")
    @classmethod
    def _read_names(cls, given: Any) -> Any:
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            return given
        if len(set(given)) < len(given):
            raise _error(given, "a name is there twice. Take it once")
        return {name: name for name in given}

    @pydantic.field_validator("take")
    @classmethod
    def _names_are_known(cls, take: dict[str, str] | None) -> dict[str, str] | None:
        if take is None:
            return None
        for here, there in take.items():
            for name in (here, there):
                part, *modules = name.split(".")
                if part not in PARTS:
                    raise _error(take, f"{name!r} begins with no part. Parts are {', '.join(PARTS)}")
                if modules and (part not in _PREFIXES or not all(modules)):
                    raise _error(take, f"{name!r} is no module. Name the part {part} as a whole")
            part = here.split(".")[0]
            if part != there.split(".")[0]:
                raise _error(take, f"{there} cannot become {here}, which is of another part. Name modules of one part")
            if here != there and part not in _PREFIXES:
                raise _error(take, f"the part {part} lies inside others. Take it whole, under its name")
        for names in (take.keys(), take.values()):
            if twice := _overlapping(names):
                raise _error(take, f"{twice} is taken twice. Take it once, or in two entries of the same path")
        return take


def _error(take: Any, what: str) -> ValueError:
    return ValueError(f"checkpoint.pretrained_checkpoint.take={take}: {what}.")


def _overlapping(names: Iterable[str]) -> str | None:
    """Return a name that lies in another, or is there twice; None if there is none."""
    for one, other in combinations(names, 2):
        if one == other or one.startswith(f"{other}."):
            return one
        if other.startswith(f"{one}."):
            return other
    return None


def lies_in(key: str, name: str) -> bool:
    """Whether a weight lies in a part or in a module of one.

    Args:
        key: of a checkpoint.
        name: of a part (``vision``), of a module of it (``vision.encoders.1``) or of the weight itself.
    """
    if name in PARTS:
        return part_of(key) == name
    return part_of(key) == name.split(".")[0] and (key == name or key.startswith(f"{name}."))


def moved(key: str, names: Mapping[str, str]) -> str | None:
    """Return what a weight is called elsewhere, by ``names`` (name of its place -> name there); None: none holds it."""
    for here, there in names.items():
        if lies_in(key, here):
            return key if here == there else f"{there}{key[len(here) :]}"
    return None
