"""Upcycling: a dense language model's feed-forward layers become mixtures of experts, at checkpoint level.

Sparse Upcycling (arXiv 2212.05055); virtual groups of Upcycling LLMs into MoE (arXiv 2410.07524).
"""

from megavlm.upcycle.folder import Upcycled, upcycle_folder
from megavlm.upcycle.plan import UpcycleSettings

__all__ = ["UpcycleSettings", "Upcycled", "upcycle_folder"]
