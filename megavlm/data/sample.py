"""One training sample, ready to stand in a batch. Shape letters: S tokens, T tiles, I images, H W pixels of a tile."""

from dataclasses import dataclass

from torch import Tensor

from megavlm.batch import SkippedSample


@dataclass
class Sample:
    """Tokens and tiles of one conversation."""

    key: str
    """Which one, as a person can find it: ``file.jsonl:17``."""
    tokens: Tensor
    """``[S]`` int64, placeholders and tags expanded."""
    labels: Tensor
    """``[S]`` int64: the next token where it is trained, else 0."""
    loss_mask: Tensor
    """``[S]`` float32: weight of each position's loss."""
    visible_tiles: Tensor
    """``[S, 2]`` int64: half-open range of the sample's tiles."""
    tile_spans: Tensor
    """``[T, 2]`` int64: half-open range of the token positions of each tile; empty for a tile of the context."""
    tile_context: Tensor
    """``[T]`` int64: tokens of each tile in the context of cross-attention; 0: its features stand among the tokens."""
    tile_tags: Tensor
    """``[T, G]`` int64: ids of the tag that goes into the context with each tile, -1 behind its end."""
    tiles: Tensor
    """``[T, 3, H, W]`` uint8, RGB."""
    tiles_per_image: Tensor
    """``[I]`` int64."""
    tokens_per_image: tuple[int, ...]
    """Tags and image tokens of each image."""
    source: int = 0
    """Index of the data source that it comes from."""
    num_degraded: int = 0
    """Images that got fewer tiles than the tiling chose, so that the sample fits."""
    num_dropped_images: int = 0
    """Images that were left out, or cut off with the end of the text, so that the sample fits."""
    is_cut: bool = False
    """Whether the end of its text was cut off, so that it fits."""

    @property
    def num_tokens(self) -> int:
        """S."""
        return self.tokens.numel()

    @property
    def num_trained_tokens(self) -> int:
        """Positions with a loss."""
        return int(self.loss_mask.count_nonzero())


@dataclass
class Prompt:
    """What a model is given to answer."""

    sample: Sample
    """Ends with the prefix of the assistant's turn; trains nothing."""
    reference_answer: str
    """The text of the turn that was left out; empty where the conversation ended with the user."""


class SampleError(Exception):
    """A conversation that gives no sample."""

    def __init__(self, skipped: SkippedSample) -> None:
        """Keep what goes into the batch's list of skipped samples."""
        super().__init__(f"{skipped.key}: {skipped.reason}: {skipped.message}")
        self.skipped = skipped

    def __reduce__(self) -> tuple[type["SampleError"], tuple[SkippedSample]]:
        """Pickle by the argument of ``__init__``; the default would hand it the message."""
        return (SampleError, (self.skipped,))
