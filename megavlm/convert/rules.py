"""The rows of a weight map: which tensors of a published checkpoint make up one tensor of ours, and how.

A row is data: two patterns of names and a layout. The layouts are the whole vocabulary; each works on full tensors, in
both directions, without arithmetic, so that there and back again is bit-equal.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_FIELDS = {"layer": r"\d+", "leaf": r"weight|bias"}


class Layout(Protocol):
    """How tensors of theirs and one tensor of ours hold the same numbers."""

    def merge(self, theirs: Sequence[Tensor]) -> Tensor:
        """Return our tensor."""

    def split(self, ours: Tensor) -> list[Tensor]:
        """Return their tensors, in the order of the row's names."""


@dataclass(frozen=True)
class Same:
    """One tensor, as it is."""

    def merge(self, theirs: Sequence[Tensor]) -> Tensor:
        """Return their tensor."""
        return theirs[0]

    def split(self, ours: Tensor) -> list[Tensor]:
        """Return our tensor."""
        return [ours]


@dataclass(frozen=True)
class LeadingOnes:
    """Theirs has ``count`` leading dimensions of size 1 that ours has not."""

    count: int

    def merge(self, theirs: Sequence[Tensor]) -> Tensor:
        """Drop the leading dimensions."""
        shape = theirs[0].shape
        if tuple(shape[: self.count]) != (1,) * self.count:
            raise ValueError(f"has shape {tuple(shape)}, which does not start with {self.count} dimensions of size 1")
        return theirs[0].reshape(shape[self.count :])

    def split(self, ours: Tensor) -> list[Tensor]:
        """Add the leading dimensions."""
        return [ours.reshape((1,) * self.count + tuple(ours.shape))]


@dataclass(frozen=True)
class GroupedQKV:
    """Queries, keys and values as three tensors; megatron-core has them as one, group by group.

    Our rows are, for each key/value group: the queries of the group's heads, its key, its value.
    """

    num_heads: int
    num_groups: int

    def merge(self, theirs: Sequence[Tensor]) -> Tensor:
        """Interleave ``[heads * D, ...]``, ``[groups * D, ...]`` and ``[groups * D, ...]``."""
        query, key, value = theirs
        channels = query.shape[0] // self.num_heads
        expected = [self.num_heads * channels, self.num_groups * channels, self.num_groups * channels]
        rows = [tensor.shape[0] for tensor in theirs]
        if rows != expected or channels == 0:
            raise ValueError(f"have {rows} rows, which are not {self.num_heads} heads in {self.num_groups} groups")
        groups = [tensor.unflatten(0, (self.num_groups, -1)) for tensor in (query, key, value)]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def split(self, ours: Tensor) -> list[Tensor]:
        """Return queries, keys, values."""
        heads_per_group = self.num_heads // self.num_groups
        groups = ours.unflatten(0, (self.num_groups, heads_per_group + 2, -1))
        parts = groups.split((heads_per_group, 1, 1), dim=1)
        return [part.flatten(0, 2).contiguous() for part in parts]


@dataclass(frozen=True)
class PackedQKV:
    """Queries, keys and values of all heads one after the other in one tensor; ours is interleaved head by head."""

    num_heads: int

    def merge(self, theirs: Sequence[Tensor]) -> Tensor:
        """Interleave ``[3 * heads * D, ...]``."""
        rows = theirs[0].shape[0]
        if rows % (3 * self.num_heads):
            raise ValueError(f"has {rows} rows, which are not queries, keys and values of {self.num_heads} heads")
        return GroupedQKV(self.num_heads, self.num_heads).merge(theirs[0].chunk(3))

    def split(self, ours: Tensor) -> list[Tensor]:
        """Put all queries first, then keys, then values."""
        return [torch.cat(GroupedQKV(self.num_heads, self.num_heads).split(ours))]


@dataclass(frozen=True)
class GatedMLP:
    """Gate and up projections as two tensors; ours is one, gate first."""

    def merge(self, theirs: Sequence[Tensor]) -> Tensor:
        """Stack them."""
        return torch.cat(list(theirs))

    def split(self, ours: Tensor) -> list[Tensor]:
        """Cut in the middle."""
        return [half.contiguous() for half in ours.chunk(2)]


@dataclass(frozen=True)
class Experts:
    """The matrices of experts as tensors of their own, expert by expert; ours is one, stacked along a new dimension.

    Of each expert ``per_expert`` tensors become one, its rows one after the other (gate, then up).
    """

    per_expert: int

    def merge(self, theirs: Sequence[Tensor]) -> Tensor:
        """Stack them."""
        shapes = sorted({tuple(tensor.shape) for tensor in theirs})
        if len(shapes) > 1:
            raise ValueError(f"have shapes {shapes}, which are not those of equal experts")
        experts = [theirs[first : first + self.per_expert] for first in range(0, len(theirs), self.per_expert)]
        return torch.stack([torch.cat(list(tensors)) for tensors in experts])

    def split(self, ours: Tensor) -> list[Tensor]:
        """Take them apart."""
        return [part.contiguous() for expert in ours for part in expert.chunk(self.per_expert)]


@dataclass(frozen=True)
class Rule:
    """One row. Names may hold ``{layer}`` (a number) and ``{leaf}`` (weight or bias), the same on both sides."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = Same()

    def their_names(self, our_key: str) -> tuple[str, ...] | None:
        """Return the names that make up ``our_key``, or None where the row is not about it."""
        match = _pattern(self.ours).fullmatch(our_key)
        return None if match is None else tuple(name.format(**match.groupdict()) for name in self.theirs)

    def our_key(self, their_name: str) -> str | None:
        """Return the key that ``their_name`` is part of, or None where the row is not about it."""
        for name in self.theirs:
            match = _pattern(name).fullmatch(their_name)
            if match is not None:
                return self.ours.format(**match.groupdict())
        return None


def under(rules: Iterable[Rule], *, ours: str, theirs: str) -> tuple[Rule, ...]:
    """Return the rows with a prefix before each name: a part's table inside the table of a whole model."""
    return tuple(
        dataclasses.replace(rule, ours=ours + rule.ours, theirs=tuple(theirs + name for name in rule.theirs))
        for rule in rules
    )


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    pattern = re.escape(name)
    for field, values in _FIELDS.items():
        pattern = pattern.replace(re.escape("{" + field + "}"), f"(?P<{field}>{values})")
    return re.compile(pattern)
