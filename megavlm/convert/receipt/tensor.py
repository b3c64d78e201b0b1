"""Compares every tensor of a conversion, one at a time, and says of each name without a counterpart why it has none."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megavlm.convert.parts import EMBEDDING, OUTPUT_LAYER
from megavlm.convert.receipt.pair import Pair
from megavlm.convert.staging import progress_bar
from megavlm.convert.weight_map import WeightReader
from megavlm.models.part import part_of

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_LAYER = re.compile(r"(.*?\blayers\.\d+)\.")


@dataclass(frozen=True)
class TensorRow:
    """One tensor of ours, and what it is made of or became."""

    key: str
    names: tuple[str, ...]
    """Theirs."""
    shape: tuple[int, ...]
    dtype: str
    """Of the published tensors."""
    bit_equal: bool = False
    num_different: int = 0
    """Values whose bits differ."""
    max_abs: float = 0.0
    max_rel: float = 0.0
    """Largest difference divided by the largest value."""
    note: str = ""
    problem: str = ""
    """Why it could not be compared."""

    @property
    def layer(self) -> str:
        """What it is summed up with: its layer, or the first two words of its key."""
        match = _LAYER.match(self.key)
        return match.group(1) if match else ".".join(self.key.split(".")[:2])

    @property
    def fault(self) -> str | None:
        """What does not hold; None if nothing."""
        if self.problem or self.bit_equal:
            return self.problem or None
        total = torch.Size(self.shape).numel()
        return (
            f"{self.key} ({', '.join(self.names)}): {self.num_different} of {total} values differ, by up to "
            f"{self.max_abs:.3g} ({self.note})"
        )


@dataclass(frozen=True)
class Unmapped:
    """A name on one side that has no counterpart on the other."""

    name: str
    side: str
    """``ours`` or ``theirs``."""
    reason: str
    is_fault: bool = False


@dataclass(frozen=True)
class LayerRow:
    """Tensors of one layer together."""

    layer: str
    num_tensors: int
    num_bit_equal: int
    max_abs: float
    max_rel: float


def compare_tensors(pair: Pair) -> tuple[list[TensorRow], list[Unmapped]]:
    """Compare all tensors of a pair of folders. What was converted to another type is compared after rounding to it.

    Returns:
        A row for each of our tensors that the published folder has the part of, and the names without counterpart.
    """
    reader = WeightReader(pair.table, pair.published)
    own = [key for key in sorted(pair.weights) if part_of(key) in pair.parts.weight_parts]
    with progress_bar() as progress:
        rows = [_compare(pair, reader, key) for key in progress.track(own, description="comparing tensors")]
    unmapped = [
        Unmapped(key, "ours", f"{part_of(key)}: this part is not in the published folder")
        for key in sorted(pair.weights)
        if part_of(key) not in pair.parts.weight_parts
    ]
    language = pair.parts.language
    if language is not None and language.share_embeddings_and_output_weights and OUTPUT_LAYER not in pair.weights:
        unmapped.append(Unmapped(OUTPUT_LAYER, "ours", f"tied: is {EMBEDDING}"))
    return rows, unmapped + _unmapped_names(pair, reader)


def sum_layers(rows: Iterable[TensorRow]) -> list[LayerRow]:
    """Sum tensors up layer by layer, in the order of the layers' numbers."""
    groups: dict[str, list[TensorRow]] = {}
    for row in rows:
        groups.setdefault(row.layer, []).append(row)
    natural = sorted(
        groups, key=lambda name: [(not w.isdigit(), int(w) if w.isdigit() else w) for w in name.split(".")]
    )
    return [
        LayerRow(
            name,
            len(groups[name]),
            sum(row.bit_equal for row in groups[name]),
            max(row.max_abs for row in groups[name]),
            max(row.max_rel for row in groups[name]),
        )
        for name in natural
    ]


def _compare(pair: Pair, reader: WeightReader, key: str) -> TensorRow:
    """Read both sides of one tensor and compare them."""
    try:
        names = pair.table.find(key)[1]
        theirs = reader.read(key)
    except ValueError as error:
        return TensorRow(key, (), (), "", problem=str(error))
    ours, notes = pair.weights[key], []
    num_new = ours.shape[0] - theirs.shape[0]
    if pair.is_import and key in (EMBEDDING, OUTPUT_LAYER) and num_new > 0:
        notes.append(f"{num_new} of our {ours.shape[0]} rows are new")
        ours = ours[: theirs.shape[0]]
    dtype = _name(theirs.dtype)
    if ours.shape != theirs.shape:
        problem = f"{key} has shape {tuple(ours.shape)}, and {', '.join(names)} give {tuple(theirs.shape)}"
        return TensorRow(key, names, tuple(theirs.shape), dtype, problem=problem)
    if ours.dtype != theirs.dtype:
        notes.append(f"ours is {_name(ours.dtype)}")
    source, found = (theirs, ours) if pair.is_import else (ours, theirs)
    expected = source.to(found.dtype)
    differs = _bits(found) != _bits(expected)
    num_different = int(differs.count_nonzero())
    if num_different == 0:
        return TensorRow(key, names, tuple(ours.shape), dtype, bit_equal=True, note="; ".join(notes))
    first = differs.nonzero()[0]
    place = tuple(first.tolist())
    notes.append(f"first at {list(place)}: {float(found[place]):.6g}, expected {float(expected[place]):.6g}")
    distance = (found.float() - expected.float()).abs().nan_to_num(nan=torch.inf)
    max_abs = float(distance[differs].max())
    scale = max(float(expected.float().abs().nan_to_num().max()), torch.finfo(torch.float32).tiny)
    return TensorRow(
        key, names, tuple(ours.shape), dtype, False, num_different, max_abs, max_abs / scale, "; ".join(notes)
    )


def _unmapped_names(pair: Pair, reader: WeightReader) -> list[Unmapped]:
    """Their names that no tensor of ours was made of."""
    leftover = set(reader.leftover(reader.used))
    originals = dict(pair.table.tied)
    found = []
    for name in sorted(pair.published):
        spelt = pair.table.in_table_spelling(name)
        if spelt in reader.used:
            continue
        pattern = next((one for one in pair.table.unused if fnmatch.fnmatchcase(spelt, one)), None)
        if name in leftover:
            key = pair.table.our_key(spelt)
            reason = f"belongs to {key}, which ours lacks" if key else "no row of the weight map is about it"
            found.append(Unmapped(name, "theirs", reason, is_fault=True))
        elif pattern is not None:
            found.append(Unmapped(name, "theirs", f"unused: our model has no use for {pattern}"))
        else:
            found.append(Unmapped(name, "theirs", f"tied: the same bits as {originals[spelt]}"))
    return found


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
