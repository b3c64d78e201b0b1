"""What generation keeps between its steps: keys and values of every attention.

Rows of different lengths are padded on the left, so that all of them end, and go on, at the same place.

Shape letters: N rows, L tokens the cache has room for, S tokens of a step, P tokens before them.
"""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor


class KeyValueCache(StaticInferenceContext):
    """megatron-core's cache of self-attention, with left padding and with the keys and values of cross-attention."""

    def __init__(self, num_pads: Tensor, max_length: int) -> None:
        """Make an empty cache; memory is taken with the first step.

        Args:
            num_pads: ``[N]`` int64, padding tokens before each row.
            max_length: L, padding included.
        """
        super().__init__(max_batch_size=num_pads.numel(), max_sequence_length=max_length)
        self.num_pads = num_pads
        self.context: dict[int, tuple[Tensor, Tensor]] = {}
        """Layer number -> keys and values of its row's context, ``[C, N, G, D]`` each."""

    @property
    def is_empty(self) -> bool:
        """Whether no step was made yet."""
        return self.sequence_len_offset == 0

    def positions(self) -> Tensor:
        """Position of every place in its own row: ``[N, L]`` int64; 0 on padding."""
        places = torch.arange(self.max_sequence_length, device=self.num_pads.device)
        return (places - self.num_pads.unsqueeze(1)).clamp(min=0)

    def mask(self, num_tokens: int) -> Tensor:
        """What the next tokens may not see of what will be there with them.

        Args:
            num_tokens: S.

        Returns:
            ``[N, 1, S, P + S]`` bool, True where a token may not look: later tokens, and padding (which sees itself,
            because a softmax over nothing has no value).
        """
        end = self.sequence_len_offset + num_tokens
        keys = torch.arange(end, device=self.num_pads.device)
        queries = keys[-num_tokens:].unsqueeze(1)
        hidden = (keys > queries) | (keys < self.num_pads[:, None, None])
        return (hidden & (keys != queries)).unsqueeze(1)

    def advance(self, num_tokens: int) -> None:
        """Say that a step of ``num_tokens`` is done on all stages."""
        self.increment_sequence_len_offset(num_tokens)
        self.enable_decode_mode()
