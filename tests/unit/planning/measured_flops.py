"""What torch's own counter sees in real forward and backward passes."""

import functools
import itertools
from collections import Counter
from collections.abc import Collection
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from tiny_vlm import IMAGE_TOKEN_ID, VOCAB_SIZE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.batch import Batch
from megavlm.engines import MegatronEngineConfig
from megavlm.models.blip2 import PairLosses
from megavlm.models.blip2 import model as blip2
from megavlm.models.config import VLMConfig
from megavlm.models.cross_attention import CrossAttention
from megavlm.models.initialization import initialize_weights
from megavlm.models.moe import Router
from megavlm.models.moe.health import RouterObserver
from megavlm.models.part import PARTS, Trainable
from megavlm.models.vlm import VLM
from megavlm.planning.flops import count_flops
from megavlm.planning.scope import Flops


def freezings(*parts: str) -> list[tuple[str, ...]]:
    """Every choice of parts that train."""
    return [chosen for size in range(1, len(parts) + 1) for chosen in itertools.combinations(parts, size)]


DENSE = freezings("vision", "connector", "language")
CROSSED = freezings("vision", "connector", "cross_attention", "language")


def build(config: VLMConfig, trained: Trainable) -> VLM:
    # torch's counter does not know the grouped product
    settings = MegatronEngineConfig(moe_grouped_gemm=False).megatron_settings()
    model = VLM(config, settings, vocab_size=VOCAB_SIZE, image_token_id=IMAGE_TOKEN_ID)
    initialize_weights([model], seed=7)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    model.config.auxiliary_loss_scale_func = lambda: 1.0  # which the engine sets
    return model


class PartCounter:
    """Adds what torch's counter sees to the part whose code runs.

    Backward, a part begins when the gradient of its output arrives: autograd goes through what a forward pass made in
    the reverse order.
    """

    def __init__(self, model: VLM) -> None:
        self.flops = FlopCounterMode(display=False)
        self.unused: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._part = "language"
        self._seen = 0
        for name, module in model.named_modules():
            if name in ("vision", "connector"):
                self._watch(module, name)
            if isinstance(module, CrossAttention) or name.endswith(".gated_block.mlp"):
                self._watch(module, "cross_attention")
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                inside = ["experts"] if ".experts." in name else []
                module.register_forward_hook(functools.partial(self._note_unused, inside))
            if isinstance(module, Router):
                module.register_forward_hook(self._note_unused_of_router)

    def take(self) -> Counter[str]:
        """What was counted since the last time, parts that did nothing left out."""
        self._enter("language")
        counts, self._counts = +self._counts, Counter()
        return counts

    def _watch(self, module: torch.nn.Module, part: str) -> None:
        def before(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self._enter(part)
            if part == "cross_attention" and inputs[0].requires_grad:
                inputs[0].register_hook(lambda _: self._enter("language"))

        def after(_: torch.nn.Module, inputs: Any, output: Any) -> None:
            self._enter("language")
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(lambda _: self._enter(part))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _enter(self, part: str) -> None:
        self._counts[self._part] += self.flops.get_total_flops() - self._seen
        self._seen = self.flops.get_total_flops()
        self._part = part

    def _note_unused(
        self,
        inside: list[str],
        layer: ColumnParallelLinear | RowParallelLinear,
        inputs: tuple[torch.Tensor, ...],
        _: Any,
    ) -> None:
        """A layer of megatron-core that trains always computes the gradient of its input; often nothing asks for it."""
        if layer.weight is None or inputs[0].requires_grad:
            return
        adds_bias = isinstance(layer, ColumnParallelLinear) and layer.bias is not None and not layer.skip_bias_add
        if layer.weight.requires_grad or (adds_bias and layer.bias.requires_grad):
            for name in (self._part, *inside):
                self.unused[name] += 2 * inputs[0].numel() * layer.weight.shape[0]

    def _note_unused_of_router(self, router: Router, inputs: tuple[torch.Tensor, ...], _: Any) -> None:
        """megatron-core's router computes both gradients, whichever is asked for."""
        if inputs[0].requires_grad != router.weight.requires_grad:
            for name in ("language", "router"):
                self.unused[name] += 2 * inputs[0].numel() * router.num_experts

    def take_inside(self) -> Counter[str]:
        """All that was counted inside experts and routers."""
        found: Counter[str] = Counter()
        for module, counts in self.flops.get_flop_counts().items():
            words = module.split(".")
            if words[-1] in ("experts", "router") and words[-2] == "mlp":
                found[words[-1]] += sum(counts.values())
        return +found


def forget_forced_gradient(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Take back the gradient that ``VLM`` asks for where no trained weight comes before the decoder."""
    hidden_states, *others = inputs
    return (hidden_states.detach() if hidden_states.is_leaf else hidden_states, *others)


def multiply_similarities(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """BLIP-2's similarities, which are left out, without a matrix product."""
    return (images[:, :, None] * texts).sum(-1).amax(dim=1)


def measure(config: VLMConfig, batch: Batch, trained: Trainable) -> tuple[Flops, Counter[str]]:
    """Run the model forward and backward. Return what was computed, and what of the backward pass nothing uses."""
    model = build(config, trained)
    if model.text is None:
        model.language.register_forward_pre_hook(forget_forced_gradient)
    counter = PartCounter(model)
    # torch's counter does not know the fused attention of the CPU. Its plain one is counted product by product, and
    # leaves out the gradients that nothing asks for.
    with counter.flops, sdpa_kernel(SDPBackend.MATH), pytest.MonkeyPatch.context() as patch:
        # what the log tells of routers is counted with a small product, which is no part of the model
        patch.setattr(RouterObserver, "groups", lambda *_: None)
        patch.setattr(blip2, "similarity", multiply_similarities)
        losses = model(batch)
        forward = counter.take()
        loss = sum(one.sum() for one in losses) if isinstance(losses, PairLosses) else losses.sum()
        if loss.requires_grad:
            loss.backward()
    return Flops(forward, counter.take(), counter.take_inside()), counter.unused


def check(config: VLMConfig, batch: Batch, trainable: Trainable | Collection[str]) -> None:
    """Compare what is counted of a model of which this trains with what it computes."""
    trained = trainable if isinstance(trainable, Trainable) else Trainable(frozenset(trainable))
    counted = count_flops(config, batch, vocab_size=VOCAB_SIZE, trainable=trainable)
    measured, unused = measure(config, batch, trained)
    unused_by_part = Counter({part: unused[part] for part in PARTS})
    if config.learns_from_pairs:  # whose text side runs inside the Q-Former: where, the counter does not see
        assert counted.forward.total() == measured.forward.total(), trained
        assert (counted.backward + unused_by_part).total() == measured.backward.total(), trained
    else:
        assert counted.forward == measured.forward, trained
        assert counted.backward + unused_by_part == measured.backward, trained
    assert counted.inside + Counter({name: unused[name] for name in ("experts", "router")}) == measured.inside, trained
    assert counted.total == sum(counted.per_part.values())
