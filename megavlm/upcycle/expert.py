"""The weights of the upcycled model, each made of dense ones when it is asked for.

Shape letters: N experts, G shards of a dense layer, F width inside it, H hidden width.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megavlm.checkpoint.release import ReleaseTensor
from megavlm.models.initialization import generator_of
from megavlm.upcycle.plan import UpcycleSettings

ROUTER = ".mlp.router.weight"
FC1, FC2 = ".mlp.linear_fc1.weight", ".mlp.linear_fc2.weight"
EXPERTS = {FC1: ".mlp.experts.experts.linear_fc1.weight", FC2: ".mlp.experts.experts.linear_fc2.weight"}
"""End of a dense layer's key -> of the experts' in its place."""


class ExpertWeights:
    """Full tensors of a model with experts by checkpoint key."""

    def __init__(
        self,
        dense: Mapping[str, ReleaseTensor],
        read: Callable[[str], Tensor],
        wanted: Mapping[str, ReleaseTensor],
        settings: UpcycleSettings,
        router_std: float,
    ) -> None:
        """Find out what each tensor is made of.

        Args:
            dense: what the dense model holds.
            read: gives its full tensors.
            wanted: shapes of the upcycled model.
            settings: how.
            router_std: standard deviation of the router.
        """
        self._read = read
        self._settings = settings
        self._router_std = router_std
        self.sources: dict[str, str] = {}
        """Our key -> dense key that it is a copy of, or that its experts are made of. Routers have none."""
        for key in wanted:
            end = next((dense_end for dense_end, end in EXPERTS.items() if key.endswith(end)), None)
            if end is not None:
                self.sources[key] = key.removesuffix(EXPERTS[end]) + end
            elif not key.endswith(ROUTER):
                self.sources[key] = key
        assert set(self.sources.values()) == set(dense), "every dense tensor has its place"
        self.tensors = {
            key: replace(template, dtype=dense[self.sources.get(key, key.removesuffix(ROUTER) + FC1)].dtype)
            for key, template in wanted.items()
        }
        """What each holds."""

    @property
    def expert_dtypes(self) -> set[torch.dtype]:
        """Of what becomes experts."""
        return {self.tensors[key].dtype for key, source in self.sources.items() if source != key}

    def read(self, key: str) -> Tensor:
        """Return a full tensor.

        Raises:
            ValueError: the dense one cannot be read, or its factor carries it beyond what its type holds.
        """
        if key not in self.sources:
            return self.draw_router(key).to(self.tensors[key].dtype)
        tensor = self._read(self.sources[key])
        return tensor if self.sources[key] == key else self.make_experts(key, tensor)

    def draw_router(self, key: str) -> Tensor:
        """Return ``[N, H]`` float32; the G rows of a group are equal."""
        num_experts, hidden_size = self.tensors[key].shape
        num_groups = num_experts // self._settings.granularity
        rows = torch.randn((num_groups, hidden_size), generator=generator_of(self._settings.seed, key))
        return (rows * self._router_std).repeat_interleave(self._settings.granularity, dim=0)

    def make_experts(self, key: str, dense: Tensor, *, power: int = 1, with_noise: bool = True) -> Tensor:
        """Return the experts' ``[N, 2 F / G, H]`` or ``[N, H, F / G]``.

        Args:
            key: of the experts; it says which of the two.
            dense: ``[2 F, H]`` (gate, then value) or ``[H, F]``.
            power: of the second matrix's factor: 2 for the mean of squares of its gradients.
            with_noise: add the settings' noise.

        Raises:
            ValueError: a factor carries the tensor beyond what its type holds.
        """
        num_shards = self._settings.granularity
        if key.endswith(EXPERTS[FC1]):
            gate, value = (half.unflatten(0, (num_shards, -1)) for half in dense.chunk(2))
            shards = torch.cat([gate, value], dim=1)
        else:
            shards = dense.unflatten(1, (num_shards, -1)).permute(1, 0, 2)
            if self._settings.fc2_scale != 1.0:
                shards = self._scale(key, shards, self._settings.fc2_scale**power)
        experts = shards.repeat(self._settings.num_experts // num_shards, 1, 1)
        if self._settings.noise and with_noise:
            for number, expert in enumerate(experts):
                generator = generator_of(self._settings.seed, f"{key}:{number}")
                expert.add_(torch.randn(expert.shape, generator=generator) * self._settings.noise)
        return experts

    def _scale(self, key: str, tensor: Tensor, factor: float) -> Tensor:
        scaled = tensor * factor
        if not scaled.isfinite().all() and tensor.isfinite().all():
            raise ValueError(
                f"{key}: times {factor:g} is beyond what {tensor.dtype} holds. Start from float32 or bfloat16 weights."
            )
        return scaled
