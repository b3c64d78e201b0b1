"""The shapes that ``tools/benchmark.py`` knows, and the FLOPs of a step of theirs."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Shape of the model and of a batch."""

    image_size: int
    patch_size: int
    vision_layers: int
    vision_hidden_size: int
    vision_ffn_hidden_size: int
    vision_heads: int
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    vocab_size: int
    num_rows: int
    length: int

    @property
    def num_patches(self) -> int:
        """Patches of a tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_tile(self) -> int:
        """Tokens of a tile in the language model."""
        return self.num_patches // 4

    @property
    def num_tokens(self) -> int:
        """Useful tokens of a step: rows are full, nothing is padding."""
        return self.num_rows * self.length

    @property
    def image_token(self) -> int:
        """Id of the placeholder."""
        return self.vocab_size - 1


SIZES = {
    "tiny": Size(28, 7, 2, 32, 64, 2, 2, 32, 64, 4, 2, 128, 2, 24),
    "small": Size(112, 14, 6, 256, 1024, 4, 10, 512, 1536, 8, 4, 8192, 4, 256),  # 45.6 M parameters
}


def linear_flops(size: Size, trainable: Sequence[str], num_logits: int) -> int:
    """FLOPs of the matrix products with weights in one step: forward, gradient of inputs, gradient of weights.

    Args:
        size: the shape.
        trainable: parts that train.
        num_logits: positions that the output layer works on.
    """
    width, tokens = size.vision_hidden_size, size.num_rows * (size.num_patches + 1)
    head = size.hidden_size // size.num_heads
    forward = {
        "vision": tokens * size.vision_layers * (4 * width**2 + 2 * width * size.vision_ffn_hidden_size),
        "connector": size.num_rows * size.tokens_per_tile * (4 * width * size.hidden_size + size.hidden_size**2),
        "language": size.num_tokens
        * size.num_layers
        * size.hidden_size
        * (2 * size.hidden_size + 2 * size.num_query_groups * head + 3 * size.ffn_hidden_size)
        + num_logits * size.hidden_size * size.vocab_size,
    }
    patches = size.num_rows * size.num_patches * 3 * size.patch_size**2 * width
    trains_vision = "vision" in trainable
    total = patches * (2 if trains_vision else 1)  # pixels need no gradient
    for part, products in forward.items():
        total += products * (1 + (part in trainable) + (trains_vision or part != "vision"))
    return 2 * total


def step_flops(size: Size, trainable: Sequence[str], num_logits: int) -> int:
    """All FLOPs of a step that have a use: those with weights, and attention (half of it where it is causal)."""
    vision = 2 * size.num_rows * (size.num_patches + 1) ** 2 * size.vision_hidden_size * size.vision_layers
    language = size.num_rows * size.length**2 * size.hidden_size * size.num_layers
    attention = 2 * (vision * (3 if "vision" in trainable else 1) + language * 3)
    return linear_flops(size, trainable, num_logits) + attention


def matmul_shapes(size: Size) -> list[tuple[int, int, int]]:
    """The products of one decoder layer: for each weight forward, gradient of inputs, gradient of weights."""
    head = size.hidden_size // size.num_heads
    weights = (
        (size.hidden_size, size.hidden_size + 2 * size.num_query_groups * head),
        (size.hidden_size, size.hidden_size),
        (size.hidden_size, 2 * size.ffn_hidden_size),
        (size.ffn_hidden_size, size.hidden_size),
    )
    tokens = size.num_tokens
    return [shape for i, o in weights for shape in ((tokens, i, o), (tokens, o, i), (o, tokens, i))]
