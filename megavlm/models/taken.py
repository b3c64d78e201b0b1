"""What a run starts from: the weights of another run, or some of them, and where in the model they go."""

from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import pydantic

from megavlm.config import Config
from megavlm.models.part import PARTS, part_of

_PREFIXES = frozenset({"vision", "connector", "language"})
"""Parts whose keys begin with their name, so that their modules have names of their own."""


class PretrainedConfig(Config):
    """Weights of a run folder that a fresh run starts from, chosen by name."""

    path: Path
    """The run folder."""
    take: list[str] | dict[str, str] = pydantic.Field(min_length=1)
    """What to take of it: parts, or modules below them (``[vision, connector.projection]``). With other names in this
    model: the name here, then the name there (``{vision.encoders.1: vision}``)."""

    @pydantic.model_validator(mode="after")
    def _names_are_known(self) -> "PretrainedConfig":
        for here, there in self.names.items():
            self._check_name(here)
            self._check_name(there)
            part = here.split(".")[0]
            if part != there.split(".")[0]:
                raise self._error(f"{there} cannot become {here}, which is of another part. Name modules of one part")
            if here != there and part not in _PREFIXES:
                raise self._error(f"the part {part} lies inside others. Take it whole, under its name")
        for names in (list(self.take), list(self.names.values())):
            if twice := overlapping(names):
                raise self._error(
                    f"{twice} is taken twice. Take it once; for two places make two entries of {self.path}"
                )
        return self

    def _check_name(self, name: str) -> None:
        part, *modules = name.split(".")
        if part not in PARTS:
            raise self._error(f"{name!r} begins with no part. Parts are {', '.join(PARTS)}")
        if modules and (part not in _PREFIXES or not all(modules)):
            raise self._error(
                f"{name!r} names no module. Name the part {part}, or a module as vision.encoders.1 is one"
            )

    def _error(self, what: str) -> ValueError:
        return ValueError(f"checkpoint.pretrained_checkpoint.take={self.take}: {what}.")

    @property
    def names(self) -> Mapping[str, str]:
        """Name in this model -> name in the run's."""
        return self.take if isinstance(self.take, dict) else {name: name for name in self.take}


def _shape_of(value: Any) -> str:
    return "some" if isinstance(value, Mapping | PretrainedConfig) else "all"


Source = Annotated[
    Annotated[Path, pydantic.Tag("all")] | Annotated[PretrainedConfig, pydantic.Tag("some")],
    pydantic.Discriminator(_shape_of),
]
"""A run folder that all weights are taken of, or some."""


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
    """Return what a weight is called elsewhere; None if none of ``names`` (name of its place -> name there) holds it."""
    for here, there in names.items():
        if lies_in(key, here):
            return key if here == there else f"{there}{key[len(here) :]}"
    return None


def overlapping(names: Iterable[str]) -> str | None:
    """Return a name that is there twice, or lies in another; None if there is none."""
    for one, other in combinations(names, 2):
        if one == other or one.startswith(f"{other}."):
            return one
        if other.startswith(f"{one}."):
            return other
    return None
