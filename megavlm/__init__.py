"""MegaVLM: vision-language models on megatron-core, from one laptop CPU to a cluster of GPUs."""

import megavlm.runtime  # noqa: F401  settles the device before anything can import megatron.core

__version__ = "0.1.0"
