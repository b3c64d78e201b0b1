"""Finds out what the time of a training step goes to, without changing the model or what it computes.

The labels and what they hold, forward and backward together:

- ``data_wait``: from asking for the micro-batches until they are on the device, on their way through the replica too.
- ``vision``, ``connector``, ``cross_attention``: the modules of these names; the last with its norms, but without the
  addition to the residual stream.
- ``language``: all else of the model: decoder layers, embedding, output layer and loss, and putting features in place.
- ``optimizer``: the update of the weights, their gathering by the distributed optimizer left out.
- ``pipeline``: sending to and receiving from other stages, so also the bubble: waiting for a stage that computes.
- ``communication``: all other collectives. It is exposed communication: for how long this rank's computation stood
  still for one. Waiting for a slower rank counts; what runs beside a computation does not.
- ``other``: the rest; zeroing of gradients, the schedule's own work, hooks.

Each moment has one label, so they add up to the step. A module's time is without the communication inside it.
Recomputed layers count where they compute. Labels come from megatron-core 0.16.1's own functions, replaced while the
block runs, in this process alone.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megavlm.benchmark.mark import mark_gradients
from megavlm.benchmark.timeline import OTHER, Timeline
from megavlm.engines import MegatronEngine
from megavlm.models.part import part_of
from megavlm.runtime.activity import ACTIVITY, Phase

DATA_WAIT = "data_wait"
PIPELINE = "pipeline"
COMMUNICATION = "communication"
LABELS = (
    DATA_WAIT,
    "vision",
    "connector",
    "cross_attention",
    "language",
    "optimizer",
    PIPELINE,
    COMMUNICATION,
    OTHER,
)
"""All labels of a step, in the order of the model."""

_HOLDS_COMMUNICATION = (DATA_WAIT, PIPELINE, COMMUNICATION)
"""Labels inside which a collective is no change."""
_COLLECTIVES = (
    "_allgather_base",
    "_reduce_scatter_base",
    "_end_coalescing",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)
"""Methods of torch's process groups that start communication, in the versions of torch that are supported; what a
version does not have is left out. All functions of ``torch.distributed`` end in them and in ``Work.wait``."""


@contextlib.contextmanager
def label_steps(engine: MegatronEngine, timeline: Timeline) -> Iterator[None]:
    """Switch the timeline's label as the steps within the block go on.

    :meth:`megavlm.benchmark.trial.Trial.step` starts and stops the timeline, and labels the wait for its data.

    Args:
        engine: with its wrapped model chunks (:class:`megavlm.models.vlm.VLM`).
        timeline: of this rank.
    """
    with contextlib.ExitStack() as stack:
        for chunk in engine.chunks:
            _replace(stack, chunk, "forward", functools.partial(_throughout, timeline, "language"))
            for name, module in chunk.named_modules():
                label = _label_of(name, module)
                if label is not None:
                    _replace(stack, module, "forward", functools.partial(_both_ways, timeline, label))
        _replace(stack, schedules, "backward_step", functools.partial(_throughout, timeline, "language"))
        if hasattr(engine, "_backward"):  # an engine that does without megatron-core's schedules
            _replace(stack, engine, "_backward", functools.partial(_throughout, timeline, "language"))
        _replace(stack, P2PCommunicator, "_communicate", functools.partial(_throughout, timeline, PIPELINE))
        for name in _COLLECTIVES:
            if hasattr(ProcessGroup, name):
                _replace(stack, ProcessGroup, name, functools.partial(_communicating, timeline))
        _replace(stack, Work, "wait", functools.partial(_communicating, timeline))
        _replace(stack, ACTIVITY, "begin", functools.partial(_beginning, timeline))
        yield


def _label_of(name: str, module: torch.nn.Module) -> str | None:
    """The label that a module of a chunk brings, if its parent has another one."""
    if name in ("vision", "connector"):
        return name
    if name == "language.embedding":  # backward it comes last, behind vision encoder and connector
        return "language"
    is_outermost = part_of(name) == "cross_attention" and part_of(name.rpartition(".")[0]) != "cross_attention"
    is_there = any(True for _ in module.parameters())  # in other layers something empty stands in its place
    return "cross_attention" if is_outermost and is_there else None


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, wrap: Callable[..., Any]) -> None:
    """Put ``wrap(function)`` in the place of a function until the stack is closed."""
    before = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))

    def restore() -> None:
        if before is None:
            delattr(owner, name)  # the class's own is found again
        else:
            setattr(owner, name, before)

    stack.callback(restore)


def _throughout(timeline: Timeline, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        with timeline.during(label):
            return function(*arguments, **options)

    return run


def _communicating(timeline: Timeline, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        if timeline.label in _HOLDS_COMMUNICATION:
            return function(*arguments, **options)
        with timeline.during(COMMUNICATION):
            return function(*arguments, **options)

    return run


def _beginning(timeline: Timeline, function: Callable[..., None]) -> Callable[..., None]:
    def begin(phase: Phase, step: int | None = None) -> None:
        function(phase, step)
        if phase is Phase.UPDATING:
            timeline.switch("optimizer")

    return begin


def _both_ways(timeline: Timeline, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Backward, a module begins when the gradient of an output is there and ends when those of its inputs are. One
    whose inputs need none ends where the next one begins."""

    def begin_backward(_: Tensor) -> None:
        timeline.switch(label)

    def end_backward() -> None:
        timeline.switch("language")

    def run(*arguments: Any, **options: Any) -> Any:
        values = mark_gradients((*arguments, *options.values()), end_backward)
        arguments, values = values[: len(arguments)], values[len(arguments) :]
        with timeline.during(label):
            outputs = function(*arguments, **dict(zip(options, values, strict=True)))
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(begin_backward)
        return outputs

    return run
