"""For verbs that build models only to learn their shapes, on the meta device, which megatron-core gives no CUDA."""

import os
import sys

import torch


def restart_without_cuda() -> None:
    """Start the command again in this process with no CUDA device to be seen; nothing where there is none anyway."""
    if torch.cuda.is_available():
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        os.execve(sys.executable, [sys.executable, "-m", "megavlm", *sys.argv[1:]], environment)
