"""DeepSpeed itself: imported so that it neither compiles anything nor talks, and its one operator that is compiled."""

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.runtime import current_device
from megavlm.runtime.log import LOGGER

_INSTALL = "DS_BUILD_OPS=0 pip install -c constraints.txt -r requirements-deepspeed.txt"


def import_deepspeed() -> Any:
    """Import DeepSpeed.

    Raises:
        ValueError: it is not installed.
    """
    device = current_device()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # launchers set it; a single process has none
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"engine.kind=deepspeed: DeepSpeed is not installed ({error}). {_INSTALL}") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    compatible: Mapping[str, bool] = deepspeed.ops.__compatible_ops__
    if compatible.get("deepspeed_shm_comm"):  # on CPUs it would be compiled at every first start, a minute or two
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def load_async_io(nvme_path: Path) -> Any:
    """Load the operator that reads and writes files beside computing. At its first use on a machine it is compiled;
    ranks that come together wait for the one that compiles.

    Args:
        nvme_path: what it is for, to be named.

    Raises:
        ValueError: DeepSpeed is not installed, or the operator cannot be compiled here.
    """
    builder = import_deepspeed().ops.op_builder.AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise ValueError(
            f"engine.nvme_path={nvme_path}: DeepSpeed's async_io operator cannot be compiled here: libaio is missing, "
            "or a C++ compiler. apt-get install libaio-dev g++, or offload to cpu. `megavlm doctor` says which."
        )
    LOGGER.info("loading DeepSpeed's async_io operator; at its first use here it is compiled, which takes minutes")
    try:
        return builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        raise ValueError(
            f"engine.nvme_path={nvme_path}: DeepSpeed's async_io operator could not be compiled: "
            f"{str(error).strip()}. Mend what `megavlm doctor` names, or offload to cpu."
        ) from error


class quiet(warnings.catch_warnings):  # noqa: N801  it is used like contextlib's
    """A block in which DeepSpeed may use what torch has deprecated."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", FutureWarning)
