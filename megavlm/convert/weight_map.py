"""A family's weight map, and what is done with it: published weights into a model of any layout, and back.

Works on full tensors under checkpoint keys on our side (``language.decoder.layers.3.mlp.linear_fc2.weight``). Tensors
come from any mapping of names, so a reader that opens files only when asked for a name fits. Nothing is dropped in
silence: each tensor of a checkpoint is either used, named in the map as unused, or an error.
"""

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from megavlm.convert.rules import Rule
from megavlm.models.weights import fill_weights

_MOST_NAMED = 8


@dataclass(frozen=True)
class WeightMap:
    """How one family names and lays out its weights."""

    rules: tuple[Rule, ...]
    unused: tuple[str, ...] = ()
    """Their tensors that our model has no use for (shell patterns): a pooling head, the other tower. Those that a row
    is about all the same are carried beside the weights, to be written again (see ``carried.py``)."""
    tied: tuple[tuple[str, str], ...] = ()
    """(name, same as): tensors that a checkpoint may repeat where they are tied; dropped if they really are equal."""
    spellings: tuple[tuple[str, str], ...] = ()
    """(prefix met, prefix in the rules): other names that checkpoints use for the same tensors."""
    idle_norms: tuple[tuple[str, int], ...] = ()
    """(our key without weight or bias, width): LayerNorms that their class has and our features never pass through.
    Where none was carried, one that changes nothing is written."""
    elsewhere: tuple[tuple[str, str], ...] = ()
    """(prefix, what to do): tensors that a release may leave to another folder."""

    def find(self, our_key: str, given: Collection[str] = ()) -> tuple[Rule, tuple[str, ...]]:
        """Return the row about ``our_key`` and their names.

        Args:
            our_key: of the tensor.
            given: names that a folder has. Where rows differ, that whose names are all among them is taken; else the
                first, by which folders are written.

        Raises:
            ValueError: no row is about it.
        """
        rows = [(rule, names) for rule in self.rules if (names := rule.their_names(our_key)) is not None]
        if rows:
            return next((row for row in rows if all(name in given for name in row[1])), rows[0])
        raise ValueError(
            f"{our_key}: the weight map has no row for it. This family has no such tensor; check the recipe."
        )

    def our_key(self, their_name: str) -> str | None:
        """Return the key that ``their_name`` is part of; None if no row is about it or our model has no use for it."""
        return None if self.is_unused(their_name) else self._key_of(their_name)

    def carried_key(self, their_name: str) -> str | None:
        """Return our key for a tensor that our model has no use for and a folder of the family has; None for others."""
        return self._key_of(their_name) if self.is_unused(their_name) else None

    def carries(self, our_key: str) -> bool:
        """Whether a folder of the family has a tensor of ours that our model has no use for."""
        found = (rule.their_names(our_key) for rule in self.rules)
        names = next((names for names in found if names is not None), ())
        return bool(names) and all(self.is_unused(name) for name in names)

    def _key_of(self, their_name: str) -> str | None:
        keys = (rule.our_key(their_name) for rule in self.rules)
        return next((key for key in keys if key is not None), None)

    def in_table_spelling(self, their_name: str) -> str:
        """Return the name as the rules spell it (or as it is, where no row is about it)."""
        candidates = [their_name]
        for met, table in self.spellings:
            if their_name.startswith(met):
                candidates.append(table + their_name.removeprefix(met))
        known = (name for name in candidates if self.our_key(name) is not None or self.is_unused(name))
        return next(known, their_name)

    def is_unused(self, their_name: str) -> bool:
        """Whether the map says that our model has no use for the tensor."""
        return any(fnmatch.fnmatchcase(their_name, pattern) for pattern in self.unused)

    def parts(self) -> set[str]:
        """Parts of the model that the map is about: the first words of our keys."""
        return {rule.ours.split(".", 1)[0] for rule in self.rules}


class WeightReader:
    """Published tensors under the spelling of a map's rules; remembers which were used."""

    def __init__(self, weight_map: WeightMap, tensors: Mapping[str, Tensor]) -> None:
        """Compare names.

        Args:
            weight_map: of the family.
            tensors: full tensors by their names; on the ``meta`` device they are good for all but :meth:`leftover`.
        """
        self._map = weight_map
        self._tensors = tensors
        self._given = {weight_map.in_table_spelling(name): name for name in tensors}
        self.used: set[str] = set()
        """Names, as the rules spell them, of the tensors that were read."""

    def read(self, our_key: str) -> Tensor:
        """Return our full tensor.

        Raises:
            ValueError: a tensor that it is made of is not there, or has another shape than the map's heads give.
        """
        rule, names = self._map.find(our_key, self._given)
        missing = [name for name in names if name not in self._given]
        if missing:
            hint = "Check the model part of the recipe against the weights' own configuration."
            hint = next((text for prefix, text in self._map.elsewhere if missing[0].startswith(prefix)), hint)
            if any(name == copy for name in missing for copy, _ in self._map.tied):
                hint = "If the weights tie it, set model.language.share_embeddings_and_output_weights=true."
            raise ValueError(f"{our_key}: the given weights lack {', '.join(missing)}. {hint}")
        self.used.update(names)
        return self._merge(our_key, rule, names)

    def carried_keys(self) -> list[str]:
        """Return our keys of the given tensors that are carried; one of which some are missing is not."""
        found: dict[str, None] = {}
        for name in self._given:
            key = self._map.carried_key(name)
            if key is not None and all(other in self._given for other in self._map.find(key)[1]):
                found[key] = None
        return list(found)

    def read_carried(self, our_key: str) -> Tensor:
        """Return one of :meth:`carried_keys`, in our layout.

        Raises:
            ValueError: it has another shape than the map's heads give.
        """
        return self._merge(our_key, *self._map.find(our_key))

    def _merge(self, our_key: str, rule: Rule, names: tuple[str, ...]) -> Tensor:
        tensors = [self._tensors[self._given[name]] for name in names]
        try:
            return rule.layout.merge(tensors)
        except ValueError as problem:
            raise ValueError(f"{our_key}: {', '.join(names)} {problem}. Check the numbers of heads.") from None

    def leftover(self, used: set[str]) -> list[str]:
        """Return given names (as given) that are neither in ``used``, nor unused, nor copies of a used tensor."""
        rest = [name for name in self._given if name not in used and not self._map.is_unused(name)]
        return sorted(self._given[name] for name in rest if not self._is_copy(name))

    def _is_copy(self, name: str) -> bool:
        for copy, original in self._map.tied:
            if name == copy and original in self._given:
                return torch.equal(self._tensors[self._given[copy]], self._tensors[self._given[original]])
        return False


def to_ours(weight_map: WeightMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a whole published state dict.

    Args:
        weight_map: of the family.
        tensors: full tensors by their names.

    Returns:
        Full tensors (padding not included) by our checkpoint keys, dtypes unchanged. A tied output layer comes out as
        a tensor of its own if the checkpoint repeats it.

    Raises:
        ValueError: a tensor is not in the map, or lacks the others that it belongs together with.
    """
    reader = WeightReader(weight_map, tensors)
    keys = {weight_map.our_key(weight_map.in_table_spelling(name)) for name in tensors}
    converted = {key: reader.read(key) for key in sorted(key for key in keys if key is not None)}
    refuse_leftovers(reader.leftover(reader.used))
    return converted


def to_theirs(weight_map: WeightMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert full tensors under our checkpoint keys to a published state dict, spelt as its files are.

    Args:
        weight_map: of the family.
        tensors: full tensors, padding not included.

    Raises:
        ValueError: a key is not in the map.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        rule, names = weight_map.find(key)
        converted.update(zip(names, rule.layout.split(tensor), strict=True))
    return converted


def load_weights(chunks: Sequence[Any], weight_map: WeightMap, tensors: Mapping[str, Tensor]) -> None:
    """Fill the parts of a model that a map is about, under any tensor- and pipeline-parallel layout, in place.

    All ranks call it, each with its own chunks and the same tensors; all raise the same error.

    Args:
        chunks: this rank's (unwrapped) model chunks; keys begin with the part's name.
        weight_map: of the family.
        tensors: full tensors by their names.

    Raises:
        ValueError: the model wants a tensor that is not given, a shape differs, or a given tensor is not used.
    """
    reader = WeightReader(weight_map, tensors)
    problem = None
    try:
        fill_weights(chunks, lambda slot: reader.read(slot.key), weight_map.parts())
    except ValueError as error:
        problem = str(error)
    reports = _gather((problem, reader.used))
    for other_problem, _ in reports:
        if other_problem is not None:
            raise ValueError(other_problem)
    refuse_leftovers(reader.leftover({name for _, used in reports for name in used}))


def _gather(report: tuple[str | None, set[str]]) -> list[tuple[str | None, set[str]]]:
    """Return every rank's report: under pipeline parallelism no rank alone knows which tensors were used."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [report]
    reports: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reports, report)
    return reports


def refuse_leftovers(names: list[str]) -> None:
    """Refuse tensors that would be dropped.

    Raises:
        ValueError: there are any.
    """
    if not names:
        return
    shown = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
    raise ValueError(
        f"weights: {len(names)} of the given tensors have no place in the model: {shown}. Check the model part of the "
        "recipe (layers, biases, norms, tied embeddings) against the weights' own configuration."
    )
