"""Layer scale (CaiT, arXiv 2103.17239), which InternViT and DINOv2 have on both branches of a layer."""

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.models.weights import start_at
from megavlm.runtime import current_device


class LayerScale(torch.nn.Module):
    """Adds a branch to the residual stream, each channel times a learned scale.

    It stands where megatron-core has its bias-dropout-add: called with the mode, it gives the function that adds. Shape
    letters: S sequence, N rows of a batch, D hidden width.
    """

    def __init__(self, config: TransformerConfig, scale: float) -> None:
        super().__init__()
        scales = torch.full((config.hidden_size,), scale, dtype=config.params_dtype, device=current_device())
        self.weight = start_at(torch.nn.Parameter(scales), scale)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Return :meth:`add`, the same in training and evaluation: the encoder has no dropout."""
        return self.add

    def add(self, branch_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        """``residual + scale * (branch + bias)``, all ``[S, N, D]`` but the bias ``[D]``."""
        assert dropout == 0.0, "built with hidden_dropout 0"
        branch, bias = branch_and_bias
        if bias is not None:
            branch = branch + bias
        return torch.addcmul(residual, branch, self.weight)
