"""Adam(W) with the contract of Apex's and Transformer Engine's FusedAdam, on torch's own fused kernels.

megatron-core's optimizers keep ``step`` in the parameter group. Its fallback for machines without those packages,
torch.optim.AdamW, keeps one ``step`` tensor per parameter, and megatron-core then restores a resumed run with one
tensor shared by all parameters: each parameter's update counts it up once more. This class is used in its place.

Source: the update is Kingma & Ba (arXiv 1412.6980) with decoupled weight decay, Loshchilov & Hutter (arXiv 1711.05101).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """Adam whose step count lives in each parameter group (``group["step"]``, an int).

    State of a parameter: ``exp_avg`` and ``exp_avg_sq``, of its own shape and dtype. Parameters, gradients and moments
    are updated in place. A group's step counts every call of :meth:`step`, whether or not its parameters had gradients,
    so the groups of all ranks agree.

    Args:
        params: parameters or parameter groups, float32 or bfloat16, on CPU or CUDA.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        adam_w_mode: decoupled weight decay (AdamW); False adds ``weight_decay * param`` to the gradient.
        bias_correction: must be True; torch's kernels know nothing else.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ) -> None:
        if not bias_correction:
            raise ValueError("bias_correction=False: torch's fused Adam always corrects. Leave it True.")
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}: none may be below 0. Raise the negative one."
            )
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}: both must lie in [0, 1). Lower the one that does not.")
        self._kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; the others keep their value and moments.

        Args:
            closure: evaluates the model again and returns the loss, which is then returned here.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for params in _by_kernel_call(group["params"]).values():
                self._update(group, params)
        return loss

    def initialize_state(self) -> None:
        """Give every parameter its zero moments and every group its step now instead of at the first update."""
        for group in self.param_groups:
            group.setdefault("step", 0)
            self._make_moments(group["params"])

    def _make_moments(self, params: list[Tensor]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        self._make_moments(params)
        # The kernel reads the step and leaves it alone, so one tensor serves all parameters of the call.
        step = torch.full((), float(group["step"]), dtype=torch.float32, device=params[0].device)
        self._kernel(
            params,
            [param.grad for param in params if param.grad is not None],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _by_kernel_call(params: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """The parameters that have gradients, by device and dtype: one kernel call takes one of each."""
    calls: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        if param.grad is not None and param.numel():
            calls.setdefault((param.device, param.dtype), []).append(param)
    return calls
