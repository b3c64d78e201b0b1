"""Times what a mixture of experts adds to a step: router, dispatch of the tokens, experts.

The phases are megatron-core's own (``MoELayer.forward``), told apart by their names. Backward, a phase begins when the
gradients of its outputs arrive and ends when those of its inputs are made: autograd goes through what a forward pass
made in the reverse order, in one thread.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from megavlm.benchmark.mark import mark_gradients

PHASES = ("router", "permute", "exchange", "experts", "unpermute")
"""Router: logits, choice and losses. Permute: sort the tokens by expert, before and behind the exchange. Exchange: send
them to the ranks of their experts and back; waiting for other ranks counts. Unpermute: back, weighted and summed."""
DISPATCH = ("permute", "exchange", "unpermute")
"""The phases that a dense layer does not need and that compute nothing."""

_PHASE_OF_METHOD = {
    "dispatch_preprocess": "permute",
    "token_dispatch": "exchange",
    "dispatch_postprocess": "permute",
    "combine_preprocess": "unpermute",
    "token_combine": "exchange",
    "combine_postprocess": "unpermute",
}
"""Of a token dispatcher."""


@contextlib.contextmanager
def time_experts(chunks: Sequence[torch.nn.Module], wait: Callable[[], None]) -> Iterator[defaultdict[str, float]]:
    """Time the phases of all layers with experts while the block runs.

    Args:
        chunks: this rank's model chunks.
        wait: returns when the device has done what it was given; called where a phase begins and ends, so that steps
            take longer than without.

    Yields:
        Phase (:data:`PHASES`) -> seconds so far, forward and backward together.
    """
    clock = _Clock(wait)
    replaced: list[tuple[Any, str, Any]] = []
    for layer in (module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)):
        places = [(layer.router, "forward", "router"), (layer.experts, "forward", "experts")]
        places += [(layer.token_dispatcher, method, phase) for method, phase in _PHASE_OF_METHOD.items()]
        for owner, method, phase in places:
            replaced.append((owner, method, vars(owner).get(method)))
            setattr(owner, method, clock.timed(phase, getattr(owner, method)))
    try:
        yield clock.seconds
    finally:
        for owner, method, before in replaced:
            delattr(owner, method)  # the class's own is found again
            if before is not None:
                setattr(owner, method, before)


class _Clock:
    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._wait = wait

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function that takes and gives tensors, alone or in a tuple."""

        def run(*arguments: Any, **options: Any) -> Any:
            start_of_backward: list[float] = []

            def end_backward() -> None:
                if start_of_backward:
                    self.seconds[phase] += self._now() - start_of_backward.pop()

            arguments = mark_gradients(arguments, end_backward)
            start = self._now()
            outputs = function(*arguments, **options)
            self.seconds[phase] += self._now() - start
            is_single = not isinstance(outputs, tuple)
            marked = mark_gradients((outputs,) if is_single else outputs, lambda: start_of_backward.append(self._now()))
            return marked[0] if is_single else marked

        return run

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()
