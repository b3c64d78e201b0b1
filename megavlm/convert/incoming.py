"""Published weights as those of our model, read one tensor at a time."""

from dataclasses import replace

import torch
from torch import Tensor

from megavlm.checkpoint.release import ReleaseTensor
from megavlm.convert.families import Family
from megavlm.convert.parts import EMBEDDING, OUTPUT_LAYER, ModelParts, weight_shapes
from megavlm.convert.read_hf import PublishedFolder
from megavlm.convert.weight_map import WeightReader, refuse_leftovers

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Incoming:
    """The weights of our model, made of published ones when they are asked for."""

    def __init__(self, published: PublishedFolder, family: Family, parts: ModelParts, vocab_size: int | None) -> None:
        """Check names, shapes and dtypes of all weights by the headers alone.

        Raises:
            ValueError: a tensor is missing, has another shape or dtype than the model's, or no place in the model.
        """
        self._published = published
        self._reader = WeightReader(family.weight_map(parts), published)
        checked = WeightReader(family.weight_map(parts), published.templates)
        shapes = weight_shapes(parts, vocab_size or 1)
        self.tensors: dict[str, ReleaseTensor] = {}
        for key, wanted in shapes.items():
            found = checked.read(key)
            self._check_dtype(key, found.dtype)
            self._check_shape(key, tuple(found.shape), wanted.shape)
            self.tensors[key] = replace(wanted, dtype=found.dtype)
        refuse_leftovers(self._reader.leftover(checked.used))
        self.carried = {key: checked.read_carried(key) for key in checked.carried_keys()}
        """Templates of what the model has no use for and an exported folder has (see ``carried.py``)."""
        for key, template in self.carried.items():
            self._check_dtype(key, template.dtype)

    def _check_dtype(self, key: str, dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            raise ValueError(
                f"{self._published.path}: {key} is of type {dtype}, which is not one of "
                f"{', '.join(map(str, _DTYPES))}. Quantised weights cannot be converted; take the original ones."
            )

    def _check_shape(self, key: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found == wanted or (key in (EMBEDDING, OUTPUT_LAYER) and found[1:] == wanted[1:] and found[0] < wanted[0]):
            return
        raise ValueError(
            f"{self._published.path}: {key} has shape {found}, and the model's has {wanted}. config.json and the "
            "weights, or the recipe, are not of one model: check them."
        )

    def read_carried(self, key: str) -> Tensor:
        """Return a full tensor of :attr:`carried`."""
        return self._reader.read_carried(key)

    def read(self, key: str) -> Tensor:
        """Return our full tensor. New rows of the vocabulary are the mean of the others."""
        tensor = self._reader.read(key)
        num_rows = self.tensors[key].shape[0]
        if tensor.shape[0] == num_rows:
            return tensor
        new = tensor.float().mean(0).to(tensor.dtype).expand(num_rows - tensor.shape[0], -1)
        return torch.cat([tensor, new])
