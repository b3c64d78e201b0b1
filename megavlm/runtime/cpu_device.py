"""Lets an unmodified megatron-core run where there is no CUDA: its "current CUDA device" becomes the CPU, or ``meta``.

megatron-core asks ``torch.cuda`` for its device in some fifty places. :func:`install` puts an import hook in place that
gives every ``megatron.core.*`` module, under its global name ``torch``, a *copy* of torch's namespace whose ``cuda`` is
:func:`_cuda_view` and whose factories read ``device="cuda"`` as the view's device. Everyone else keeps the real torch:
``torch.cuda.is_available()`` stays False and ``tensor.cuda()`` still raises outside megatron-core.

``meta`` builds one rank of a layout too large for this machine, without memory (see :mod:`megavlm.runtime.fake_world`).

The two tables are the whole of it: ``_CUDA_NAMES`` (what replaces ``torch.cuda.<name>``) and
:data:`megavlm.runtime.megatron_patches.MODULE_PATCHES` (what is changed inside single modules). No other part of the
project may know of this. The cost: about 1 microsecond for a factory call, 20 ns for any other name.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megavlm.runtime.megatron_patches import MODULE_PATCHES

DEVICES = ("cpu", "meta")

_PACKAGE = "megatron.core"
_view_device: torch.device | None = None  # None: not installed


def install(device: str = "cpu") -> None:
    """Give megatron-core a view of torch in which the current CUDA device is ``device``.

    Must run before the first import of ``megatron.core``; ``import megavlm`` does it where there is no CUDA. A second
    call changes nothing but the device.

    Args:
        device: ``cpu``, or ``meta`` to build models without memory.

    Raises:
        ValueError: ``device`` is neither, or the machine has CUDA.
        RuntimeError: megatron.core has been imported already.
    """
    global _view_device
    if device not in DEVICES:
        raise ValueError(f"device={device!r}: is not one of {', '.join(DEVICES)}. Choose one of them.")
    if torch.cuda.is_available():
        raise ValueError(
            f"device={device!r}: this machine has {torch.cuda.device_count()} CUDA device(s), and megatron-core uses"
            " them as it is. Set CUDA_VISIBLE_DEVICES= (empty) to do without."
        )
    if _view_device is None:
        imported = sorted(name for name in sys.modules if _is_megatron(name))
        if imported:
            raise RuntimeError(
                f"device={device!r}: {len(imported)} modules of {_PACKAGE} were imported before the view was installed"
                f" (the first is {imported[0]}). Import megavlm first."
            )
        sys.meta_path.insert(0, _Finder(_torch_view()))
        _replace_methods()
    _view_device = torch.device(device)


def current_device() -> torch.device:
    """The device that this process builds and trains on: ``cuda:<LOCAL_RANK>``, ``cpu`` or ``meta``."""
    if _view_device is not None:
        return _view_device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def view_device(device: str) -> Iterator[torch.device]:
    """Point an installed view at another device for a while.

    Raises:
        RuntimeError: no view is installed.
    """
    if _view_device is None:
        raise RuntimeError(
            f"device={device!r}: megatron-core sees CUDA here, and a view can only be installed before it is imported."
            " Start the process with CUDA_VISIBLE_DEVICES= (empty)."
        )
    before = _view_device
    install(device)
    try:
        yield torch.device(device)
    finally:
        install(before.type)


def _is_megatron(module_name: str) -> bool:
    return module_name == _PACKAGE or module_name.startswith(_PACKAGE + ".")


# ---- torch.cuda.<name> as megatron-core sees it ----------------------------------------------------------------------


class _Stream:
    """Stands for ``torch.cuda.Stream`` and ``Event``: work on a CPU is done in order, so nothing is waited for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: "_Stream | None" = None) -> "_Stream":
        # moe/token_dispatcher keeps the event and waits for it later, so there has to be one
        return event or _Stream()

    def wait(self, *args: Any) -> None:
        """Nothing to wait for."""

    wait_stream = wait_event = synchronize = record = wait

    def query(self) -> bool:
        """All work is done."""
        return True

    def elapsed_time(self, end: "_Stream") -> float:
        """Milliseconds on the device: none."""
        return 0.0


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for calls that wait for or clean a GPU."""


def _only_stream(device: Any = None) -> _Stream:
    return _Stream()


def _no_stream_context(stream: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = "cuda") -> None:
    torch.set_rng_state(state)


_CUDA_NAMES: dict[str, Any] = {
    # tensor_parallel/mappings, /layers (backward), param_and_grad_buffer, p2p_communication, rotary embedding, moe
    # router, attention, distrib_optimizer, dist_checkpointing: `device=torch.cuda.current_device()`.
    # Without it: AssertionError "Torch not compiled with CUDA enabled".
    "current_device": current_device,
    # p2p_communication._communicate, dist_checkpointing (async, fully_parallel), inference. Without it: the same.
    "synchronize": _nothing,
    "empty_cache": _nothing,
    # moe/token_dispatcher.__init__ and _maybe_dtoh_and_synchronize, text_generation_controller.
    # Without it: RuntimeError on the first MoE layer.
    "Stream": _Stream,
    "Event": _Stream,
    "stream": _no_stream_context,
    "current_stream": _only_stream,
    "default_stream": _only_stream,
    # tensor_parallel/random: model_parallel_cuda_manual_seed, the tracker's add() and fork().
    # Without get_rng_state: an error. Without the others: silently wrong dropout streams.
    "manual_seed": _manual_seed,
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
}

# Called with device="cuda" or pin_memory=True by schedules.forward_backward_*, optimizer.__init__, clip_grads,
# utils.local_multi_tensor_l2_norm, transformer/utils.get_default_causal_mask, exchange_utils, rope_utils.
# Without it: AssertionError "Torch not compiled with CUDA enabled".
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")


def _on_view_device(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory: CUDA devices become the view's, and memory is never pinned (for no GPU)."""

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _view_device
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return build


def _copy_of(module: types.ModuleType) -> types.ModuleType:
    """A module with the same names; what the original gains later (lazy submodules) is found there too."""
    copy = types.ModuleType(module.__name__, module.__doc__)
    copy.__dict__.update({name: value for name, value in vars(module).items() if not name.startswith("__")})
    copy.__dict__["__getattr__"] = lambda name: getattr(module, name)
    return copy


def _cuda_view() -> types.ModuleType:
    cuda = _copy_of(torch.cuda)
    cuda.__dict__.update(_CUDA_NAMES)
    return cuda


def _torch_view() -> types.ModuleType:
    view = _copy_of(torch)
    view.__dict__["cuda"] = _cuda_view()
    view.__dict__.update({name: _on_view_device(getattr(torch, name)) for name in _FACTORIES})
    return view


# ---- the import hook -------------------------------------------------------------------------------------------------


class _Loader(importlib.abc.Loader):
    """Runs a megatron.core module's own loader, then hands the module its view of torch and its patches."""

    def __init__(self, loader: importlib.abc.Loader, view: types.ModuleType) -> None:
        self._loader = loader
        self._view = view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # get_source, get_data, ...: for inspect and tracebacks

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        if getattr(module, "torch", None) is torch:
            module.__dict__["torch"] = self._view
        for patch in MODULE_PATCHES.get(module.__name__.removeprefix(_PACKAGE + "."), ()):
            patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds megatron.core modules as Python does, and wraps their loader."""

    def __init__(self, view: types.ModuleType) -> None:
        self._view = view

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_megatron(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._view)
        return spec


# ---- three methods that have no namespace ----------------------------------------------------------------------------


class _TypeName(str):
    """Name of a tensor type, ``torch.FloatTensor``, that equals ``torch.cuda.FloatTensor`` too."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and other.rpartition(".")[2] == self.rpartition(".")[2]

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _called_by_megatron() -> bool:
    """Whether the method that asks was called from a megatron.core module."""
    return _is_megatron(sys._getframe(2).f_globals.get("__name__", ""))


def _replace_methods() -> None:
    """Replace Tensor.cuda, Module.cuda and Tensor.type for calls that come from megatron.core; others see no change."""
    tensor_cuda, module_cuda, tensor_type = torch.Tensor.cuda, torch.nn.Module.cuda, torch.Tensor.type

    # clip_vit_model.__init__, distrib_optimizer.get_parameter_state_dp_zero, exchange_utils, rope_utils.
    # Without it: AssertionError "Torch not compiled with CUDA enabled".
    @functools.wraps(tensor_cuda)
    def cuda_of_tensor(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to(_view_device) if _called_by_megatron() else tensor_cuda(self, *args, **kwargs)

    # module.cuda(torch.cuda.current_device()) in megatron-core's own model builders. Without it: the same.
    @functools.wraps(module_cuda)
    def cuda_of_module(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return self.to(_view_device) if _called_by_megatron() else module_cuda(self, *args, **kwargs)

    # distrib_optimizer._build_model_and_main_param_groups and optimizer.__init__ compare type() with 'torch.cuda.*'.
    # Without it: TypeError "Wrapped parameters must be one of torch.cuda.FloatTensor, ...".
    @functools.wraps(tensor_type)
    def type_of_tensor(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = tensor_type(self, *args, **kwargs)
        return _TypeName(kind) if isinstance(kind, str) and _called_by_megatron() else kind

    torch.Tensor.cuda = cuda_of_tensor  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = cuda_of_module  # type: ignore[method-assign, assignment]
    torch.Tensor.type = type_of_tensor  # type: ignore[method-assign, assignment]
