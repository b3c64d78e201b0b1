"""VPGTrans (arXiv 2305.01278): a vision encoder and connector trained for one language model, taken to another."""

from megavlm.transfer.converter import ConverterSettings
from megavlm.transfer.make import Transferred, transfer

__all__ = ["ConverterSettings", "Transferred", "transfer"]
