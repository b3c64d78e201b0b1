"""The weighted mean of checkpoints, one tensor at a time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megavlm.config import Config
from megavlm.convert.own_checkpoint import OwnCheckpoint

_TOKENIZER = "tokenizer/"


def check_alike(checkpoints: Sequence[OwnCheckpoint]) -> None:
    """Make sure that a mean of the checkpoints means something.

    Raises:
        ValueError: they are not of one architecture or vocabulary, names the setting, file or tensor with both values;
            or they have LoRA.
    """
    first = checkpoints[0]
    language = first.model.model.language
    if language is not None and language.lora is not None:
        raise ValueError(
            f"{first.source}: has LoRA, and the mean of A times the mean of B is not the mean of A times B. Convert "
            "each run to a dense model (megavlm convert merges), convert those back, and mix them."
        )
    for other in checkpoints[1:]:
        _compare_models(first, other)
        _compare_tokenizers(first, other)
        for key, tensor in first.tensors.items():
            theirs = other.tensors[key]  # equal models have equal keys
            if (theirs.shape, theirs.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"{other.source}: {key} is {_shown(theirs.shape, theirs.dtype)}, and in {first.source} "
                    f"{_shown(tensor.shape, tensor.dtype)}. Only models of one architecture and precision are mixed."
                )


def _compare_models(first: OwnCheckpoint, other: OwnCheckpoint) -> None:
    ours, theirs = (_leaves(one.model.model) for one in (first, other))
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{other.source}: model.{key}={theirs.get(key)!r}, and in {first.source} {ours.get(key)!r}. Only "
                "models of one architecture are mixed."
            )


def _leaves(config: Config) -> dict[str, object]:
    """Every setting that shapes the function, by its dotted name; those of fresh weights are left out."""
    leaves: dict[str, object] = {}

    def walk(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else key)
        elif not name.endswith("init_method_std"):
            leaves[name] = value

    walk(config.model_dump(mode="json"), "")
    return leaves


def _compare_tokenizers(first: OwnCheckpoint, other: OwnCheckpoint) -> None:
    ours, theirs = (
        {name: path for name, path in one.small_files.items() if name.startswith(_TOKENIZER)} for one in (first, other)
    )
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].read_bytes() != theirs[name].read_bytes():
            raise ValueError(
                f"{other.source}: its {name} is not that of {first.source}, so their tokens do not mean the same. Only "
                "models of one vocabulary are mixed."
            )


def _shown(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def shares(given: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return the share of each model, with the sum 1.

    Args:
        given: weights, up to a common factor; None: all alike.
        count: models.

    Raises:
        ValueError: there are not as many weights as models, or one is not a number above 0.
    """
    if given is None:
        return (1 / count,) * count
    if len(given) != count:
        raise ValueError(
            f"--weights={','.join(f'{one:g}' for one in given)}: {len(given)} for {count} models. Give one for each."
        )
    for weight in given:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"--weights: {weight:g} is not above 0. Leave that model out.")
    return tuple(weight / sum(given) for weight in given)


class Mean:
    """Gives the mean of a tensor of all checkpoints; two tensors are in memory at a time."""

    def __init__(self, checkpoints: Sequence[OwnCheckpoint], weights: Sequence[float]) -> None:
        """Take checkpoints that :func:`check_alike` has seen, and a share for each, with the sum 1."""
        self._checkpoints = checkpoints
        self._weights = weights

    def read(self, key: str) -> Tensor:
        """Read a full tensor of each, and return their mean in their dtype; it is computed in float32.

        The mean of equal tensors is that tensor, to the bit.

        Raises:
            ValueError: a file cannot be read, or a tensor holds numbers that are not finite; names it.
        """
        mean: Tensor | None = None
        so_far = 0.0
        for checkpoint, weight in zip(self._checkpoints, self._weights, strict=True):
            tensor = checkpoint.weights[key]
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{checkpoint.source}: {key} holds numbers that are not finite, and so would the soup. Leave this "
                    "model out."
                )
            so_far += weight
            # a running mean: equal tensors differ by exactly 0, where a sum of shares would be rounded
            mean = tensor.float().clone() if mean is None else mean.lerp_(tensor.float(), weight / so_far)
        assert mean is not None
        return mean.to(tensor.dtype)
