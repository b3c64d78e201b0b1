"""Sums up what routers decide while a model trains, for each layer, expert and group of tokens.

A group is the text tokens or the image tokens of one data source; padding is in none. Nothing here has a gradient or
communicates. Shape letters: N rows, S tokens a row, T tokens of this rank, L layers with experts of this model chunk,
E experts, G groups.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megavlm.batch import Batch
from megavlm.models.moe.router import Router

MODALITIES = ("text", "image")
"""A group's number is the modality's, times the number of sources, plus the source's."""

_PER_EXPERT = ("chosen", "kept", "scores")
_PER_GROUP = ("tokens", "entropy", "squared_log_sums")
_PER_LAYER = ("load_balancing_loss", "z_loss")
_NOT_COUNTED = -1


def num_groups(num_sources: int) -> int:
    """Groups of tokens: one for each modality of each source, and a last one for sources beyond ``num_sources``."""
    return len(MODALITIES) * num_sources + 1


def width(num_experts: int, num_sources: int) -> int:
    """Numbers that describe one layer: see :func:`unpack`."""
    per_group = len(_PER_EXPERT) * num_experts + len(_PER_GROUP)
    return num_groups(num_sources) * per_group + len(_PER_LAYER)


def unpack(table: Tensor, num_experts: int, num_sources: int) -> dict[str, Tensor]:
    """Name the columns of what :meth:`RouterObserver.take` gives.

    Args:
        table: ``[L, width]``.
        num_experts, num_sources: as in :func:`width`.

    Returns:
        ``chosen``, ``kept`` (choices of experts, and those that an expert had room for) and ``scores`` (sums of the
        softmax over the experts): ``[L, G, E]``. ``tokens``, ``entropy`` (sum over tokens of the entropy of their
        scores, in nats) and ``squared_log_sums`` (sum over tokens of the squared log of the sum of ``exp(logits)``):
        ``[L, G]``. ``load_balancing_loss`` and ``z_loss``, the router's own, times tokens: ``[L]``.
    """
    groups, layers = table.split([table.shape[1] - len(_PER_LAYER), len(_PER_LAYER)], dim=1)
    groups = groups.view(table.shape[0], num_groups(num_sources), -1)
    sizes = [num_experts] * len(_PER_EXPERT) + [1] * len(_PER_GROUP)
    columns = dict(zip((*_PER_EXPERT, *_PER_GROUP), groups.split(sizes, dim=2), strict=True))
    columns |= {name: columns[name].squeeze(2) for name in _PER_GROUP}
    return columns | dict(zip(_PER_LAYER, layers.unbind(1), strict=True))


class RouterObserver:
    """Watches the routers of one model chunk.

    A router is asked after each of its passes. Where activations are recomputed there are two for a micro-batch: its
    choices are counted in the model's own pass, which :meth:`watch` marks, and its auxiliary losses in the one that has
    a gradient, for in the other there are none.
    """

    def __init__(self, routers: Sequence[Router]) -> None:
        """Listen to routers, first layer to last; may be none."""
        self.layers = tuple(router.layer_number - 1 for router in routers)
        """The layers' indices in the whole model, counted from 0."""
        self._routers = routers
        self._num_sources = 1
        self._membership: Tensor | None = None
        """``[G, T]`` float32 while the chunk's own pass runs: 1 where a token is in a group."""
        self._group_sums: Tensor | None = None
        self._loss_sums: Tensor | None = None
        for row, router in enumerate(routers):
            router.register_forward_hook(functools.partial(self._observe, row))

    def tell_apart(self, num_sources: int) -> None:
        """Count the tokens of so many data sources apart; forgets what was counted."""
        self._num_sources = num_sources
        self._group_sums = self._loss_sums = None

    def groups(self, batch: Batch, image_token_id: int) -> Tensor | None:
        """The group of each token: ``[N, S]`` int64; None where nothing is counted, as in evaluation."""
        if not self._routers or not self._routers[0].training:
            return None
        groups = (batch.tokens == image_token_id).long()
        if batch.sources.numel():
            sources = batch.source_of_tokens()
            groups = groups * self._num_sources + sources
            groups = groups.masked_fill(sources >= self._num_sources, num_groups(self._num_sources) - 1)
        else:
            groups = groups * self._num_sources
        is_padding = batch.is_padding()
        return groups if is_padding is None else groups.masked_fill(is_padding, _NOT_COUNTED)

    @contextlib.contextmanager
    def watch(self, groups: Tensor | None) -> Iterator[None]:
        """Mark a chunk's own pass over its layers.

        Args:
            groups: those of this rank's tokens ``[N, S]``; None: nothing is counted.
        """
        if groups is None:
            yield
            return
        numbers = torch.arange(num_groups(self._num_sources), device=groups.device)
        # routers see tokens position by position, row within position
        self._membership = (groups.t().reshape(1, -1) == numbers.unsqueeze(1)).float()
        try:
            yield
        finally:
            self._membership = None

    def take(self) -> Tensor:
        """Give what was counted since the last time and start anew: ``[L, width]`` float64, to be added over ranks.

        Not to be called of a chunk without routers.
        """
        self._start(torch.device("cpu"))
        assert self._group_sums is not None
        assert self._loss_sums is not None
        table = torch.cat([self._group_sums.flatten(1), self._loss_sums], dim=1)
        self._group_sums = self._loss_sums = None
        return table

    def _start(self, device: torch.device) -> None:
        if self._group_sums is not None:
            return
        num_columns = len(_PER_EXPERT) * self._routers[0].num_experts + len(_PER_GROUP)
        shape = (len(self._routers), num_groups(self._num_sources), num_columns)
        self._group_sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._loss_sums = torch.zeros(len(self._routers), len(_PER_LAYER), dtype=torch.float64, device=device)

    @torch.no_grad()
    def _observe(self, row: int, router: Router, args: tuple[Tensor, ...], output: Any) -> None:
        """Take in one pass of a router (a forward hook)."""
        routing, router.last = router.last, None
        if routing is None:
            return
        self._start(routing.scores.device)
        assert self._group_sums is not None
        assert self._loss_sums is not None
        self._loss_sums[row] += torch.stack([routing.load_balancing_loss, routing.z_loss])
        if self._membership is None:
            return
        scores = routing.scores
        columns = [
            routing.chosen.float(),
            (routing.kept & routing.chosen).float(),  # experts that are filled up keep tokens that nobody chose
            scores,
            torch.ones_like(scores[:, :1]),
            torch.special.entr(scores).sum(dim=1, keepdim=True),
            self._squared_log_sums(router, args[0]),
        ]
        self._group_sums[row] += self._membership @ torch.cat(columns, dim=1)

    @staticmethod
    def _squared_log_sums(router: Router, hidden_states: Tensor) -> Tensor:
        """``[T, 1]``: each token's z-loss, 0 where the router has none. It cannot be told from the scores."""
        if not router.config.moe_z_loss_coeff:
            return hidden_states.new_zeros(hidden_states.shape[:-1].numel(), 1, dtype=torch.float32)
        logits = router.gating(hidden_states).flatten(0, -2).float()
        return torch.logsumexp(logits, dim=-1, keepdim=True).square()
