"""Several data sets as one, in given shares."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy
import pydantic

from megavlm.config import Config
from megavlm.data.conversation import Conversation
from megavlm.data.datasets import Dataset, DatasetConfig
from megavlm.data.order import EpochOrder, EpochsOrder, Order, ShareOrder

_NUM_LISTED = 10


class BlendSource(Config):
    """A data set of a blend."""

    dataset: DatasetConfig
    name: str | None = pydantic.Field(default=None, min_length=1)
    """What logs call it; the data set's own name where not given."""
    weight: pydantic.PositiveFloat | None = None
    """Its share beside the others of its group; the number of its rows where no source of the group gives one."""
    group: str | None = None
    """Which of the blend's groups it belongs to."""
    epochs: pydantic.PositiveFloat | None = None
    """How often it is used up in one pass, of a blend by epochs; 1 where not given."""

    @property
    def shown_name(self) -> str:
        """What logs call it."""
        return self.name or self.dataset.name


class BlendConfig(Config):
    """Several data sets, mixed sample by sample."""

    kind: Literal["blend"] = "blend"
    by: Literal["sampling", "epochs"] = "sampling"
    """``sampling``: in the shares of the weights, without end. ``epochs``: each pass uses every source ``epochs``
    times."""
    sources: list[BlendSource] = pydantic.Field(min_length=1)
    groups: dict[str, pydantic.PositiveFloat] = {}
    """Weights of the groups, if the sources have groups."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> "BlendConfig":
        names = self.source_names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sources: {len(twice)} name(s) stand twice: {', '.join(twice)}. Give each its own name")
        if self.by == "epochs":
            if self.groups or any(source.weight or source.group for source in self.sources):
                raise ValueError("by=epochs: has no weights and no groups. Give epochs, or use by=sampling")
            return self
        if any(source.epochs for source in self.sources):
            raise ValueError("by=sampling: epochs have no meaning here. Give weights, or use by=epochs")
        self._check_groups()
        for group in dict.fromkeys(source.group for source in self.sources):
            members = [source for source in self.sources if source.group == group]
            given = sum(source.weight is not None for source in members)
            if 0 < given < len(members):
                where = f"sources of group {group}" if group else "sources"
                raise ValueError(
                    f"{where}: {given} of {len(members)} have a weight. Give all or none one (none: by size)"
                )
        return self

    def _check_groups(self) -> None:
        used = {source.group for source in self.sources if source.group is not None}
        if used != set(self.groups) or (self.groups and any(source.group is None for source in self.sources)):
            weighed = ", ".join(sorted(self.groups)) or "none"
            found = ", ".join(sorted({str(source.group) for source in self.sources}))
            raise ValueError(
                f"groups: the blend weighs {weighed}, and its sources have {found}. Give each source one of the groups,"
                " and each group a weight"
            )

    @property
    def source_names(self) -> list[str]:
        """Of the sources, in the order of ``Batch.sources``."""
        return [source.shown_name for source in self.sources]

    @property
    def name(self) -> str:
        """What logs call it."""
        return f"a blend of {', '.join(self.source_names)}"

    def shares(self, sizes: Sequence[int]) -> list[Fraction]:
        """Return the share of each source; they add up to 1.

        Args:
            sizes: rows of each.
        """
        if self.by == "epochs":
            counts = [Fraction(count) for count in self._counts(sizes)]
            return [count / sum(counts) for count in counts]
        shares = []
        group_sum = sum(Fraction(str(weight)) for weight in self.groups.values())
        weights = [
            Fraction(str(source.weight)) if source.weight is not None else Fraction(size)
            for source, size in zip(self.sources, sizes, strict=True)
        ]
        for source, weight in zip(self.sources, weights, strict=True):
            beside = sum(
                other for member, other in zip(self.sources, weights, strict=True) if member.group == source.group
            )
            of_group = Fraction(str(self.groups[source.group])) / group_sum if source.group else Fraction(1)
            shares.append(of_group * weight / beside)
        return shares

    def _counts(self, sizes: Sequence[int]) -> list[int]:
        return [
            max(1, round(Fraction(str(source.epochs or 1)) * size))
            for source, size in zip(self.sources, sizes, strict=True)
        ]

    def order(self, sizes: Sequence[int], seed: int, shuffle: bool) -> Order:
        """Make the order of the samples."""
        inner = [EpochOrder(size, seed + number, shuffle) for number, size in enumerate(sizes)]
        if self.by == "epochs":
            return EpochsOrder(inner, self._counts(sizes), seed, shuffle)
        return ShareOrder(inner, self.shares(sizes), seed)

    def build(self) -> "Blend":
        """Open every source; ``ValueError`` where one cannot be used."""
        return Blend(self, [source.dataset.build() for source in self.sources])


class Blend:
    """Rows of all sources, one source behind the other, by number."""

    def __init__(self, config: BlendConfig, sources: Sequence[Dataset]) -> None:
        """Take the opened sources of a config."""
        self._config = config
        self._sources = list(sources)
        self.sizes = [len(source) for source in sources]
        """Usable rows of each source."""
        self._starts = numpy.concatenate([[0], numpy.cumsum(self.sizes)])
        self.num_bad_rows = sum(source.num_bad_rows for source in sources)
        self.bad_rows = [row for source in sources for row in source.bad_rows][:_NUM_LISTED]

    def __len__(self) -> int:
        """Usable rows of all sources."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[str, Conversation]:
        """See :class:`megavlm.data.datasets.Dataset`."""
        source = self.source_of(index)
        return self._sources[source][index - int(self._starts[source])]

    def source_of(self, index: int) -> int:
        """Which source a row belongs to."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(numpy.searchsorted(self._starts, index, side="right")) - 1

    def order(self, seed: int, shuffle: bool) -> Order:
        """Make the order in which training uses the rows."""
        return self._config.order(self.sizes, seed, shuffle)

    def shares(self) -> dict[str, float]:
        """Share of the samples that each source is to have, by name."""
        shares = self._config.shares(self.sizes)
        return {name: float(share) for name, share in zip(self._config.source_names, shares, strict=True)}


def order_of(dataset: Dataset, seed: int, shuffle: bool) -> Order:
    """Make the order in which training uses the rows of a data set."""
    return dataset.order(seed, shuffle) if isinstance(dataset, Blend) else EpochOrder(len(dataset), seed, shuffle)


def source_of(dataset: Dataset, index: int) -> int:
    """Which source of ``Batch.sources`` a row belongs to; 0 where there is only one."""
    return dataset.source_of(index) if isinstance(dataset, Blend) else 0
