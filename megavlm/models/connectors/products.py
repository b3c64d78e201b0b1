"""What a connector tells of its matrix products, so that operations can be counted without running it."""

from typing import NamedTuple, Protocol


class FeatureShape(NamedTuple):
    """What goes into a connector, and the width of what comes out."""

    num_tiles: int
    num_patches: int
    """Features of a tile."""
    input_size: int
    """Width of a feature."""
    output_size: int
    """Width of the language model."""

    @property
    def num_vectors(self) -> int:
        """Features of all tiles."""
        return self.num_tiles * self.num_patches


class Products(Protocol):
    """Takes a connector's products in the order in which data goes through it.

    What it is given and gives back is whether a tensor's gradient is needed: whether a trained weight or a feature with
    a gradient came before it.
    """

    @property
    def trains(self) -> bool:
        """Whether the connector's weights train."""

    def linear(self, num_vectors: int, input_size: int, output_size: int, needs_input: bool) -> bool:
        """A weight matrix. A convolution is one whose input are the values under its kernel."""

    def attention(self, num_scores: int, width: int, needs_query: bool, needs_key_value: bool) -> bool:
        """Scores and weighted values of all heads, ``width`` channels together."""
