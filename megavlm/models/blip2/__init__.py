"""BLIP-2's first stage (arXiv 2301.12597): the Q-Former and a text side of its own, trained without a language model.

The text side stands where a recipe has its language model (``model.language.kind: qformer_text``). It sends text
through the self-attention of the connector's layers and learns by three losses: contrast (ITC), matching (ITM) and
captions (ITG).
"""

from megavlm.models.blip2.config import QFormerTextConfig
from megavlm.models.blip2.model import PairLosses, QFormerText

__all__ = ["PairLosses", "QFormerText", "QFormerTextConfig"]
