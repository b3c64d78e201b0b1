"""The file of a sweep over layouts: which layouts, settings and numbers of ranks, and what recipe each row gets."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from megavlm.benchmark.override import share_out
from megavlm.build import check_run
from megavlm.config import Config, load_recipe
from megavlm.recipe import Recipe

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class Sweep(Config):
    """Layouts of one recipe to be timed, each with every combination of settings and numbers of ranks."""

    recipe: Path
    """What is trained, relative to the sweep's file."""
    overrides: list[str] = []
    """``key=value`` for every row."""
    layouts: dict[str, list[str]] = pydantic.Field(min_length=1)
    """Name -> its ``key=value``."""
    grid: dict[str, list[Any]] = {}
    """Key of the recipe -> its values; every layout is timed with every combination of them."""
    nodes: list[pydantic.PositiveInt] = pydantic.Field(default=[1], min_length=1)
    """Numbers of nodes."""
    ranks_per_node: list[pydantic.PositiveInt] | None = None
    """Numbers of ranks on each node; null: as the command line says."""
    scaling: Literal["weak", "strong"] = "weak"
    """What more ranks do: ``weak``: the global batch grows with them (the recipe's is that of the fewest ranks);
    ``strong``: it stays, and each has less of it."""
    steps: pydantic.PositiveInt = 5
    """Steps that are timed; as many again are divided into their parts."""
    warmup_steps: pydantic.NonNegativeInt = 2
    """Steps before them."""
    time_limit_minutes: pydantic.PositiveFloat = 10.0
    """Of a row, its start and the reading of its data included; one that takes longer is ended."""
    save: Path
    """Folder of all rows, relative to the current folder."""

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> "Sweep":
        for name in self.layouts:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"layouts={name!r}: is also part of a folder's name, so it may hold letters, digits and . _ + - "
                    "only and begins with a letter or digit. Rename it."
                )
        for key, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{key}=[]: has no value, so there is no row. Name one, or remove the key.")
        for where, overrides in {"overrides": self.overrides, **self._by_layout()}.items():
            for override in overrides:
                check_override(where, override)
        for key in self.grid:
            check_override(f"grid.{key}", f"{key}=")
        return self

    def _by_layout(self) -> dict[str, list[str]]:
        return {f"layouts.{name}": overrides for name, overrides in self.layouts.items()}


@dataclass(frozen=True)
class PlannedRow:
    """A row of the sweep: one layout with one setting on so many ranks."""

    layout: str
    settings: dict[str, Any]
    """Of the grid: key -> value."""
    nodes: int
    ranks_per_node: int
    recipe: Recipe | None = None
    refusal: str = ""
    """Why it cannot run at all; such a row has no recipe."""
    name: str = field(init=False)
    """Also of its folder."""

    def __post_init__(self) -> None:
        words = [self.layout, *(f"{key.split('.')[-1]}={_text(value)}" for key, value in self.settings.items())]
        name = ",".join([*words, f"{self.nodes}x{self.ranks_per_node}"])
        object.__setattr__(self, "name", re.sub(r"[^A-Za-z0-9.,_+=-]+", "-", name))

    @property
    def ranks(self) -> int:
        """All ranks of the row."""
        return self.nodes * self.ranks_per_node


def load_sweep(path: Path, overrides: Sequence[str]) -> tuple[Sweep, list[str]]:
    """Read a sweep's file and share out the overrides of the command line.

    Returns:
        The sweep, its recipe relative to the current folder, and the overrides for every row.

    Raises:
        ValueError: the file or an override is wrong; names the key and the nearest valid one.
    """
    own, for_rows = share_out(overrides, Sweep, "sweep", check_override)
    sweep = load_recipe(path, own, Sweep)
    return sweep.model_copy(update={"recipe": path.parent / sweep.recipe}), for_rows


def check_override(where: str, override: str) -> None:
    """Refuse a key that the sweep itself sets.

    Raises:
        ValueError: it is one.
    """
    key = override.partition("=")[0]
    if key == "checkpoint.save":
        raise ValueError(f"{where}={override!r}: nothing is saved but the sweep's figures. Use `save`.")


def plan_rows(sweep: Sweep, overrides: Sequence[str], ranks_per_node: int) -> list[PlannedRow]:
    """Resolve the recipe of every row: layouts, then settings, then numbers of ranks, the fewest first.

    Later ones win: the sweep's overrides, the layout's, the grid's, ``overrides`` (of the command line); under weak
    scaling the global batch is multiplied at last.

    Args:
        sweep: what to plan.
        overrides: ``key=value`` for every row.
        ranks_per_node: where the sweep gives no numbers.

    Raises:
        ValueError: the recipe itself is wrong, before any layout; or two rows would share a name. A row whose layout
            does not fit is planned with the reason.
    """
    load_recipe(sweep.recipe, [*sweep.overrides, *overrides], Recipe)
    counts = sorted(
        itertools.product(sweep.nodes, sweep.ranks_per_node or [ranks_per_node]),
        key=lambda count: (count[0] * count[1], count),
    )
    fewest = counts[0][0] * counts[0][1]
    settings = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    rows = []
    for layout, own in sweep.layouts.items():
        for setting in settings:
            of_grid = [f"{key}={_yaml(value)}" for key, value in setting.items()]
            wanted = [*sweep.overrides, *own, *of_grid, *overrides]
            for nodes, ranks in counts:
                try:
                    growth = (nodes * ranks, fewest) if sweep.scaling == "weak" else (1, 1)
                    recipe = _resolve(sweep.recipe, wanted, nodes * ranks, growth)
                    rows.append(PlannedRow(layout, setting, nodes, ranks, recipe))
                except ValueError as error:
                    rows.append(PlannedRow(layout, setting, nodes, ranks, refusal=str(error)))
    if twice := [name for name, count in Counter(row.name for row in rows).items() if count > 1]:
        raise ValueError(f"save={sweep.save}: two rows are called {twice[0]!r}. Rename a layout or drop a value.")
    return rows


def _resolve(path: Path, overrides: Sequence[str], ranks: int, growth: tuple[int, int]) -> Recipe:
    recipe = load_recipe(path, overrides, Recipe)
    batch = recipe.training.global_batch_size * growth[0]
    if batch % growth[1]:
        raise ValueError(
            f"training.global_batch_size={recipe.training.global_batch_size}: is for {growth[1]} ranks, and {growth[0]}"
            " ranks make no whole number of it. Choose one that does, or scaling: strong."
        )
    recipe = load_recipe(path, [*overrides, f"training.global_batch_size={batch // growth[1]}"], Recipe)
    check_run(recipe, ranks)
    return recipe


def _yaml(value: Any) -> str:
    """On one line, as an override takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
