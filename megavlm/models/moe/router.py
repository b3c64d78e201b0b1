"""The router: megatron-core's top-k router with auxiliary losses that mean the same under every layout.

Shape letters: T tokens of this rank, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """What a router decided on one micro-batch. No gradient."""

    scores: Tensor
    """``[T, E]`` float32: softmax over the experts."""
    chosen: Tensor
    """``[T, E]`` bool: the top k."""
    kept: Tensor
    """``[T, E]`` bool: the chosen that an expert had room for."""
    load_balancing_loss: Tensor
    """This rank's share of the layer's loss, times the micro-batch's tokens, without its coefficient; 0-d float32."""
    z_loss: Tensor
    """As ``load_balancing_loss``."""


class Router(TopKRouter):
    """Top-k router of one layer.

    megatron-core scales auxiliary losses by the tokens of a tensor-parallel rank and then divides them, like the loss
    of the text, by the number of trained tokens. In a vision-language model few tokens are trained (prompts and images
    are not), so its coefficient would be 10 or 100 times stronger than it says, and half as strong on two
    tensor-parallel ranks. Here every auxiliary loss is a mean over the tokens of the global batch, padding not counted,
    and its coefficient is the published one.
    """

    last: Routing | None = None
    """What was decided on the last micro-batch in training; whoever reads it sets it back to None."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: ``[S, N, E]``.
            padding_mask: ``[S, N]`` bool, True where a token is padding.

        Returns:
            Weights ``[T, E]``, 0 where not chosen, and ``[T, E]`` bool, what was chosen.
        """
        self._losses = {name: torch.zeros((), device=logits.device) for name in ("load_balancing_loss", "z_loss")}
        weights, kept = super().routing(logits, padding_mask)
        if self.training:
            with torch.no_grad():
                scores = torch.softmax(logits.detach().reshape(-1, self.num_experts).float(), dim=-1)
                chosen = torch.zeros_like(scores, dtype=torch.bool)
                chosen.scatter_(1, scores.topk(self.topk, dim=1).indices, True)
            self.last = Routing(scores, chosen, kept, **self._losses)
        return weights, kept

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach the z-loss, the mean of the squared log of the sum of ``exp(logits)``, to ``[T, E]`` logits."""
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self._has_auxiliary_losses():
            return logits
        squares = torch.logsumexp(logits, dim=-1).square()
        total = squares.sum() if padding_mask is None else squares.masked_fill(padding_mask, 0.0).sum()
        return self._attach(logits, "z_loss", total, coefficient)

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Attach the load-balancing loss of the micro-batch: ``E * sum_i f_i P_i`` (padding is zero in both inputs)."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        return self._balance(probs, scores_for_aux_loss, routing_map, coefficient, num_rows=1)

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Attach the load-balancing loss of each row, weighted by the row's tokens."""
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        return self._balance(probs, scores_for_aux_loss, routing_map, coefficient, num_rows=bsz)

    def _balance(self, probs: Tensor, scores: Tensor, chosen: Tensor, coefficient: float, num_rows: int) -> Tensor:
        """Attach ``sum over rows of T * E * sum_i f_i P_i`` with T the row's tokens on all tensor-parallel ranks.

        f_i is the share of the choices, P_i the mean score of expert i.
        """
        if coefficient == 0.0 or not self._has_auxiliary_losses():
            return probs
        # tokens are laid out position by position, row within position
        scores = scores.view(-1, num_rows, self.num_experts).sum(0)
        counts = chosen.view(-1, num_rows, self.num_experts).sum(0).float()
        torch.distributed.all_reduce(counts, group=self.tp_cp_group)
        num_choices = counts.sum(-1, keepdim=True).clamp(min=1.0)
        loss = self.num_experts * (scores * counts / num_choices).sum()
        return self._attach(probs, "load_balancing_loss", loss, coefficient)

    def _has_auxiliary_losses(self) -> bool:
        """A frozen router is left alone: its losses would only push the layers before it."""
        return self.training and torch.is_grad_enabled() and self.weight.requires_grad

    def _attach(self, tensor: Tensor, name: str, loss: Tensor, coefficient: float) -> Tensor:
        self._losses[name] = loss.detach().float()
        scale: Callable[[], float] = self.config.auxiliary_loss_scale_func
        return _AttachLoss.apply(tensor, loss, coefficient * scale())


class _AttachLoss(torch.autograd.Function):
    """Passes a tensor on, and in the backward pass gives a loss the gradient ``scale``."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.loss_dtype = scale, loss.dtype
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, torch.full((), ctx.scale, dtype=ctx.loss_dtype, device=gradient.device), None
