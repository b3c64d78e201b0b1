"""Start and end of a process: device, process groups, seeds, logging, signals.

Importing this package settles what megatron-core takes for its device, because that can only be settled before
``megatron.core`` is first imported. ``megavlm/__init__.py`` imports it before anything else, so any
``from megatron.core import ...`` in the project is safe, in whatever order its modules are imported:

- with CUDA nothing is installed;
- without CUDA megatron-core sees the CPU. To get that on a machine with GPUs, set ``CUDA_VISIBLE_DEVICES=`` (empty).
"""

import torch

from megavlm.runtime import cpu_device
from megavlm.runtime.cpu_device import current_device
from megavlm.runtime.log import quiet_third_parties

__all__ = ["current_device"]

quiet_third_parties()  # some of the noise comes with the import of megatron.core
if not torch.cuda.is_available():
    cpu_device.install("cpu")
