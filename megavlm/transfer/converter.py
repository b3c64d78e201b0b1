"""The word-embedding converter: a linear map from one language model's embeddings to another's.

VPGTrans (arXiv 2305.01278) trains it so that paired tokens point the same way: 1 - cos, by plain SGD. Their length is
then whatever it is; ``mse`` asks for the embeddings themselves, and is solved at once. Shape letters: V tokens, S and T
widths of source and target, N pairs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megavlm.runtime.log import LOGGER

_HELD_OUT = 20
"""One distinct pair in so many is only measured."""


@dataclass(frozen=True)
class ConverterSettings:
    """How the converter is trained. The defaults are VPGTrans'."""

    loss: Literal["cosine", "mse"] = "cosine"
    """``cosine``: 1 - cos, by SGD. ``mse``: least squares, solved; the settings below mean nothing then but the
    seed."""
    lr: float = 5.0
    batch_size: int = 4096
    """Pairs of a step."""
    epochs: int = 8
    seed: int = 0
    """Of the start, the order, and which pairs are held out."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("epochs", 1), ("seed", 0)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option}={getattr(self, name)}: must be at least {least}. Raise it.")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr={self.lr:g}: must be above 0. Raise it.")


@dataclass(frozen=True)
class Converter:
    """``x -> weight x + bias``."""

    weight: Tensor
    """``[T, S]`` float32."""
    bias: Tensor | None
    """``[T]`` float32; None: there is none."""

    def __call__(self, embeddings: Tensor) -> Tensor:
        """``[..., S]`` -> ``[..., T]``."""
        return F.linear(embeddings, self.weight, self.bias)


@dataclass(frozen=True)
class Fit:
    """How well a converter does. Mean cosines between what it makes of a token and the target's embedding."""

    num_pairs: int
    """Occurrences."""
    num_distinct: int
    cosine: float
    """Over the distinct pairs it was trained on."""
    held_out_cosine: float | None
    """Over those it was not; None: too few pairs to hold any out."""


def fit_converter(
    source: Tensor, target: Tensor, pairs: Tensor, settings: ConverterSettings, *, bias: bool
) -> tuple[Converter, Fit]:
    """Train a converter.

    Args:
        source: embeddings ``[V, S]`` of the source's language model.
        target: embeddings ``[V', T]`` of the target's.
        pairs: ids ``[N, 2]``, as :mod:`megavlm.transfer.pair` gives them.
        settings: how.
        bias: whether it has one.

    Raises:
        ValueError: there are no pairs, or training ends in numbers that are not finite.
    """
    if not len(pairs):
        raise ValueError(
            "the two language models share no tokens, so nothing says which embeddings belong together. Give "
            "--captions in a script that both vocabularies know, or choose another language model."
        )
    distinct, inverse = pairs.unique(dim=0, return_inverse=True)
    generator = torch.Generator().manual_seed(settings.seed)
    held_out = torch.zeros(len(distinct), dtype=torch.bool)
    held_out[torch.randperm(len(distinct), generator=generator)[: len(distinct) // _HELD_OUT]] = True
    trained = pairs[~held_out[inverse]]
    if len(distinct) < source.shape[1]:
        LOGGER.warning(
            "%d distinct pairs of tokens for embeddings of width %d: the converter is not determined by them",
            len(distinct),
            source.shape[1],
        )
    if settings.loss == "mse":
        converter = _solve(source, target, trained, bias=bias)
    else:
        converter = _descend(source, target, trained, settings, generator, bias=bias)
    if not (
        torch.isfinite(converter.weight).all() and (converter.bias is None or torch.isfinite(converter.bias).all())
    ):
        raise ValueError(
            f"--lr={settings.lr:g}: the converter's training ended in numbers that are not finite. Lower it, or check "
            "the embeddings."
        )

    def cosine(chosen: Tensor) -> float:
        made = converter(source[chosen[:, 0]].float())
        return F.cosine_similarity(made, target[chosen[:, 1]].float(), dim=-1).mean().item()

    measured = cosine(distinct[held_out]) if held_out.any() else None
    return converter, Fit(len(pairs), len(distinct), cosine(distinct[~held_out]), measured)


def _solve(source: Tensor, target: Tensor, pairs: Tensor, *, bias: bool) -> Converter:
    """Least squares; of several solutions the smallest."""
    read, wanted = source[pairs[:, 0]].double(), target[pairs[:, 1]].double()
    if bias:
        read = torch.cat([read, read.new_ones(len(read), 1)], dim=1)
    solution = torch.linalg.lstsq(read, wanted, driver="gelsd").solution.T.float()
    return Converter(solution[:, :-1].contiguous(), solution[:, -1].contiguous()) if bias else Converter(solution, None)


def _descend(
    source: Tensor,
    target: Tensor,
    pairs: Tensor,
    settings: ConverterSettings,
    generator: torch.Generator,
    *,
    bias: bool,
) -> Converter:
    """SGD on 1 - cos, from torch's usual start of a linear layer."""
    bound = source.shape[1] ** -0.5
    shape = (target.shape[1], source.shape[1])
    weight = torch.empty(shape).uniform_(-bound, bound, generator=generator).requires_grad_()
    offset = torch.empty(shape[0]).uniform_(-bound, bound, generator=generator).requires_grad_() if bias else None
    optimizer = torch.optim.SGD([weight] if offset is None else [weight, offset], lr=settings.lr)
    for epoch in range(settings.epochs):
        total = 0.0
        for batch in pairs[torch.randperm(len(pairs), generator=generator)].split(settings.batch_size):
            made = F.linear(source[batch[:, 0]].float(), weight, offset)
            loss = 1 - F.cosine_similarity(made, target[batch[:, 1]].float(), dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        LOGGER.info("converter: epoch %d of %d, 1 - cos %.4f", epoch + 1, settings.epochs, total / len(pairs))
    return Converter(weight.detach(), None if offset is None else offset.detach())
