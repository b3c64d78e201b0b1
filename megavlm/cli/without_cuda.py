"""For verbs that build models only to learn their shapes, on the meta device, which megatron-core gives no CUDA."""

import os
import sys

import torch

_VISIBLE, _BEFORE = "CUDA_VISIBLE_DEVICES", "MEGAVLM_CUDA_VISIBLE_DEVICES"


def restart_without_cuda() -> None:
    """Start the command again in this process with no CUDA device to be seen; nothing where there is none anyway."""
    if torch.cuda.is_available():
        environment = {**os.environ, _VISIBLE: ""}
        if _VISIBLE in os.environ:
            environment[_BEFORE] = os.environ[_VISIBLE]
        os.execve(sys.executable, [sys.executable, "-m", "megavlm", *sys.argv[1:]], environment)


def environment_before() -> dict[str, str]:
    """Return the environment as it was before :func:`restart_without_cuda`, for commands that use the devices."""
    environment = dict(os.environ)
    before = environment.pop(_BEFORE, None)
    if before is not None:
        environment[_VISIBLE] = before
    elif environment.get(_VISIBLE) == "":
        del environment[_VISIBLE]
    return environment
