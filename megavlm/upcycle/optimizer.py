"""A dense run's optimizer for the upcycled model: Adam's moments go where the weights go.

A checkpoint holds the optimizer as tensors of the parameters' shapes, ``optimizer.state.<moment>.<key>``: float32
weights (``param`` or ``fp32_param``), ``exp_avg`` and ``exp_avg_sq``. Experts get copies, cut and multiplied as the
weights are (``exp_avg_sq`` by the factor's square), the router its weights and zero moments, everything else its own.
megatron-core keeps experts in an optimizer of their own, so the parameter group of the matrices is entered twice.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.layout import read_info
from megavlm.checkpoint.match import is_of_optimizer
from megavlm.checkpoint.pickles import COMMON_NAME, weights_only
from megavlm.checkpoint.release import ReleaseTensor, RunState
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.checkpoint.writer import EXTRA_NAME
from megavlm.upcycle.dense import DenseModel
from megavlm.upcycle.expert import EXPERTS, FC1, ROUTER, ExpertWeights

_KEY = re.compile(r"optimizer\.state\.(param|fp32_param|exp_avg|exp_avg_sq)\.(.+)")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_REMEDY = "Use --optimizer fresh."


class CarriedOptimizer:
    """The optimizer's tensors of the upcycled model, and the rest that a resumed run needs."""

    def __init__(self, dense: DenseModel, weights: ExpertWeights) -> None:
        """Read what the dense run saved of its optimizer.

        Args:
            dense: what is upcycled.
            weights: of the upcycled model.

        Raises:
            ValueError: it has no optimizer, or one of another kind.
        """
        self._weights = weights
        checkpoint = dense.checkpoint
        if checkpoint is None:
            raise ValueError(f"--optimizer=carried: a Hugging Face folder holds no optimizer. {_REMEDY}")
        self._saved = CheckpointWeights(checkpoint, with_optimizer=True)
        keys = [key for key in self._saved if is_of_optimizer(key)]
        info = read_info(checkpoint)
        if not keys or info is None or dense.recipe is None:
            raise ValueError(f"--optimizer=carried: {checkpoint} holds weights only. {_REMEDY}")
        unknown = next((key for key in keys if not _KEY.fullmatch(key)), None)
        if unknown is not None:
            raise ValueError(f"--optimizer=carried: {checkpoint} holds {unknown}, which Adam has not. {_REMEDY}")
        self.files = {
            path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.glob("rng/*")) if path.is_file()
        }
        """The random number generators of the dense run's ranks."""
        self.tensors: dict[str, ReleaseTensor] = {}
        """Checkpoint key -> what it holds."""
        self._sources: dict[str, str] = {}
        self._find_sources(keys)
        trains_experts = any(key.endswith(ROUTER) for key in self.tensors)
        common = _read_common(checkpoint)
        if trains_experts:
            common = common | {"optimizer": _with_experts(common.get("optimizer"), checkpoint)}
        self.run = RunState(info.iteration, info.layout, common, (checkpoint / EXTRA_NAME).read_bytes())
        """What else a run is resumed from."""

    def _find_sources(self, keys: list[str]) -> None:
        places: dict[str, list[str]] = {}
        for key, dense in self._weights.sources.items():
            places.setdefault(dense, []).append(key)
        for saved in keys:
            moment, dense = _split(saved)
            template = self._saved.template(saved)
            for key in places.get(dense, [dense]):
                shape = tuple(template.shape) if key == dense else self._weights.tensors[key].shape
                self._announce(f"optimizer.state.{moment}.{key}", shape, template.dtype, saved)
            router = dense.removesuffix(FC1) + ROUTER
            if dense.endswith(FC1) and router in self._weights.tensors:
                shape = self._weights.tensors[router].shape
                self._announce(f"optimizer.state.{moment}.{router}", shape, template.dtype, None)

    def _announce(self, key: str, shape: tuple[int, ...], dtype: torch.dtype, source: str | None) -> None:
        self.tensors[key] = ReleaseTensor(shape, shape, dtype)
        if source is not None:
            self._sources[key] = source

    def read(self, key: str) -> Tensor:
        """Return a full tensor.

        Raises:
            ValueError: the saved one cannot be read.
        """
        moment, inner = _split(key)
        if key not in self._sources:
            wanted = self.tensors[key]
            if moment in _MOMENTS:
                return torch.zeros(wanted.shape, dtype=wanted.dtype)
            weights_dtype = self._weights.tensors[inner].dtype  # as they are in the model, rounding included
            return self._weights.draw_router(inner).to(weights_dtype).to(wanted.dtype)
        tensor = self._saved[self._sources[key]]
        if not inner.endswith(tuple(EXPERTS.values())) or self._sources[key] == key:
            return tensor
        power = 2 if moment == "exp_avg_sq" else 1
        return self._weights.make_experts(inner, tensor, power=power, with_noise=moment not in _MOMENTS)


def _split(key: str) -> tuple[str, str]:
    match = _KEY.fullmatch(key)
    assert match is not None
    return match.group(1), match.group(2)


def _read_common(checkpoint: Path) -> dict[str, Any]:
    """Read ``common.pt``, which has been looked through by now."""
    with weights_only():
        common = torch.load(checkpoint / COMMON_NAME, weights_only=True)
    assert isinstance(common, dict)
    return common


def _with_experts(optimizer: Any, checkpoint: Path) -> dict[int, Any]:
    """Return the states of two optimizers, of which the second has the experts."""
    if not isinstance(optimizer, Mapping) or not _groups(optimizer):
        raise ValueError(f"--optimizer=carried: {checkpoint / COMMON_NAME} is not of one Adam. {_REMEDY}")
    matrices = next((group for group in _groups(optimizer) if group.get("wd_mult") == 1.0), None)
    if matrices is None:
        raise ValueError(f"--optimizer=carried: {checkpoint / COMMON_NAME} has no group of matrices. {_REMEDY}")
    groups = [matrices | {"is_expert_parallel": True}]
    experts: dict[str, Any] = dict(optimizer)
    if "param_groups" in experts:
        experts["param_groups"] = groups
    else:
        experts["optimizer"] = experts["optimizer"] | {"param_groups": groups}
    return {0: dict(optimizer), 1: experts}


def _groups(optimizer: Mapping[Any, Any]) -> list[dict[str, Any]]:
    inner = optimizer.get("optimizer", optimizer)
    return list(inner.get("param_groups", [])) if isinstance(inner, Mapping) else []
