"""Tensors of a published folder that our model has no use for, carried so that the whole folder can be written again.

Layers after the selected one, a norm behind the features, a pooling head: what the class of ``transformers`` has and
the rows of its weight map are about. They lie beside the imported weights in ``published/unused.safetensors``, under
our keys and in our layout, so that a tower that came in alone can go out inside a whole model and the other way round.
A trained run does not have them.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.convert.parts import ModelParts
from megavlm.convert.read_hf import read_header, read_tensor
from megavlm.convert.weight_map import WeightMap
from megavlm.convert.write_hf import ShardWriter
from megavlm.models.vision.dual import DualConfig
from megavlm.runtime.log import LOGGER

CARRIED_NAME = "published/unused.safetensors"
"""Inside a checkpoint."""
_FIRST_LAYER = "vision.encoder.layers.0."


def write_carried(path: Path, templates: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a file of carried tensors, one in memory at a time.

    Args:
        path: of the file.
        templates: our keys -> tensors on the ``meta`` device.
        read: gives the tensor of a key.
    """
    groups = [{key: template} for key, template in templates.items()]
    with ShardWriter(path.parent, groups, sys.maxsize, stem=path.stem) as writer:
        for key in templates:
            writer.write(key, read(key))


class CompletedWeights:
    """The weights of a checkpoint, and with them what a published folder has beside them."""

    def __init__(
        self,
        weights: CheckpointWeights,
        keys: Iterable[str],
        parts: ModelParts,
        weight_map_of: Callable[[ModelParts], WeightMap],
    ) -> None:
        """Find out what comes along.

        Args:
            weights: of the checkpoint.
            keys: of it, to be written.
            parts: what they are of.
            weight_map_of: the exported family's.

        Raises:
            ValueError: the carried file is damaged.
        """
        self._weights = weights
        self._file = weights.folder / CARRIED_NAME
        own, held = list(keys), read_header(self._file) if self._file.is_file() else {}
        self.parts, self.table = parts, weight_map_of(parts)
        if not self._has_later_layers(own, held):
            self.parts = _as_built(parts)
            self.table = weight_map_of(self.parts)
        self._carried = {key: template for key, template in held.items() if self.table.carries(key)}
        self._idle = {
            f"{key}.{leaf}": torch.full((width,), value, dtype=weights.template("vision.embedding.weight").dtype)
            for key, width in self.table.idle_norms
            for leaf, value in (("weight", 1.0), ("bias", 0.0))
            if f"{key}.{leaf}" not in self._carried
        }
        self.keys = [*own, *self._carried, *self._idle]
        """Our keys of all tensors to write."""
        if self._carried:
            LOGGER.info("%d tensors that the model has no use for are written as they came in", len(self._carried))
        if self._idle:
            LOGGER.info("%s: the model has none; written as 1 and 0, features do not pass it", ", ".join(self._idle))

    @property
    def extra(self) -> frozenset[str]:
        """Our keys of what is not the model's."""
        return frozenset({*self._carried, *self._idle})

    def template(self, key: str) -> Tensor:
        """Return a tensor on the ``meta`` device with the shape and dtype of ``key``'s."""
        if key in self._carried:
            return self._carried[key]
        return self._idle[key].to("meta") if key in self._idle else self._weights.template(key)

    def __getitem__(self, key: str) -> Tensor:
        """Read a full tensor.

        Raises:
            ValueError: a file cannot be read.
        """
        if key in self._carried:
            return read_tensor(self._file, key)
        return self._idle[key] if key in self._idle else self._weights[key]

    def _has_later_layers(self, own: Iterable[str], held: Mapping[str, Tensor]) -> bool:
        """Whether the vision encoder's layers after the selected one are all there (or there are none)."""
        vision = self.parts.vision
        if vision is None:
            return True
        assert not isinstance(vision, DualConfig), "no such model is exported"
        leaves = [key.removeprefix(_FIRST_LAYER) for key in own if key.startswith(_FIRST_LAYER)]
        later = [
            f"vision.encoder.layers.{layer}.{leaf}"
            for layer in range(vision.num_layers_built, vision.num_layers)
            for leaf in leaves
        ]
        return all(key in held and self.table.carries(key) for key in later)


def _as_built(parts: ModelParts) -> ModelParts:
    """The same features from an encoder that ends with the selected layer."""
    vision = parts.vision
    assert vision is not None
    assert not isinstance(vision, DualConfig), "no such model is exported"
    LOGGER.info(
        "the vision encoder is written with %d of the %d layers that it was published with, and features are its last "
        "layer's: the others are not in the checkpoint",
        vision.num_layers_built,
        vision.num_layers,
    )
    ending = vision.model_copy(update={"num_layers": vision.num_layers_built, "select_layer": -1})
    return parts.model_copy(update={"vision": ending})
