"""The receipt of a conversion: every tensor, and the outputs of both sides on the same inputs, against stated limits.

The Hugging Face side is loaded by ``transformers`` in a process of its own (``reload.py``), ours by the engine on one
rank; both compute in float32. ``receipt.json`` and ``receipt.md`` are written into the target folder.
"""

from megavlm.convert.receipt.document import Receipt
from megavlm.convert.receipt.make import make_receipt

__all__ = ["Receipt", "make_receipt"]
