"""What a module tells of its matrix products, so that operations can be counted without running it."""

import abc
from collections.abc import Sequence
from typing import NamedTuple


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


class Products(abc.ABC):
    """Takes a module's matrix products in the order in which data goes through it.

    What it is given and gives back is whether a tensor's gradient is needed: whether a trained parameter, or an input
    with a gradient, came before it. Parameters go by their names in the module, and every one is told, in a product or
    not: a norm or learned queries that train ask for gradients too.
    """

    @abc.abstractmethod
    def within(self, module: str) -> "Products":
        """The same for a module inside, by its name (``layers.3``)."""

    @abc.abstractmethod
    def trains(self, *parameters: str) -> bool:
        """Whether one of these parameters trains."""

    @abc.abstractmethod
    def matrix(
        self, parameters: Sequence[str], num_vectors: int, input_size: int, output_size: int, needs_input: bool
    ) -> bool:
        """A product with a weight matrix. A convolution is one whose input are the values under its kernel.

        Args:
            parameters: what holds the matrix; all of it counts as trained if one of them is.
            num_vectors: vectors that are multiplied.
            input_size, output_size: their width before and after it.
            needs_input: whether their gradient is needed.

        Returns:
            Whether the output's gradient is needed.
        """

    @abc.abstractmethod
    def attention(self, num_scores: int, width: int, *, query: bool, key: bool, value: bool) -> bool:
        """Scores and weighted values of all heads, ``width`` channels together.

        Args:
            num_scores: of one head.
            width: channels of all heads.
            query, key, value: whether their gradients are needed.

        Returns:
            Whether the output's gradient is needed.
        """

    def linear(
        self,
        module: str,
        num_vectors: int,
        input_size: int,
        output_size: int,
        needs_input: bool,
        *,
        bias: bool = True,
    ) -> bool:
        """A linear layer. Arguments and result as of :meth:`matrix`; ``bias``: whether it has one."""
        output = self.matrix([f"{module}.weight"], num_vectors, input_size, output_size, needs_input)
        return output or (bias and self.trains(f"{module}.bias"))

    def norm(self, module: str, needs_input: bool, *, bias: bool = True) -> bool:
        """A norm: no product. Return whether the output's gradient is needed."""
        return needs_input or self.trains(f"{module}.weight", *([f"{module}.bias"] if bias else []))
