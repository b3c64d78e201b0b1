"""Adds up floating-point operations, module by module, by the names that the model's modules have."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megavlm.models.connectors import Products
from megavlm.models.part import Trainable, part_of

_COUNTED_INSIDE = ("experts", "router")


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per part: ``vision``, ``connector``, ``cross_attention``, ``language``, ``text``.

    LoRA counts as ``language``. A part that does nothing has no entry, and reads as 0.
    """

    forward: Counter[str] = field(default_factory=Counter)
    """Of the forward pass."""
    backward: Counter[str] = field(default_factory=Counter)
    """Of the backward pass: gradients of trained weights, and of everything between them and the loss."""
    inside: Counter[str] = field(default_factory=Counter)
    """Both passes of ``experts`` and ``router``, which count as ``language`` above."""

    @property
    def per_part(self) -> Counter[str]:
        """Both passes together."""
        return self.forward + self.backward

    @property
    def total(self) -> int:
        """Both passes of all parts."""
        return self.forward.total() + self.backward.total()

    def __add__(self, other: "Flops") -> "Flops":
        """Both together: the micro-batches of a step."""
        inside = self.inside + other.inside
        return Flops(self.forward + other.forward, self.backward + other.backward, inside)


class Scope(Products):
    """A module of the model. Its products are counted for the part that its name says."""

    def __init__(self, trained: Trainable, name: str = "", flops: Flops | None = None) -> None:
        """Make it.

        Args:
            trained: which parameters train.
            name: of the module, as in the names of the model's parameters; "": the whole model.
            flops: added to in place; None: counted from nothing.
        """
        self.flops = Flops() if flops is None else flops
        self._trained = trained
        self._name = name

    def within(self, module: str) -> "Scope":
        """The same for a module inside; what is counted there counts here too."""
        return Scope(self._trained, self._full(module), self.flops)

    def trains(self, *parameters: str) -> bool:
        """Whether one of these parameters trains."""
        return any(self._full(name) in self._trained for name in parameters)

    def matrix(
        self, parameters: Sequence[str], num_vectors: int, input_size: int, output_size: int, needs_input: bool
    ) -> bool:
        """A product with a weight matrix: one product forward, one for each gradient."""
        product = 2 * num_vectors * input_size * output_size
        weight_trains = self.trains(*parameters)
        self._add(self._full(parameters[0]), product, product * (weight_trains + needs_input))
        return weight_trains or needs_input

    def attention(self, num_scores: int, width: int, *, query: bool, key: bool, value: bool) -> bool:
        """Scores and weighted values: two products forward; backward one for the scores and for each of the three."""
        product = 2 * num_scores * width
        scores = query or key
        self._add(self._name, 2 * product, product * (scores + query + key + value))
        return scores or value

    def _full(self, name: str) -> str:
        return f"{self._name}.{name}" if self._name else name

    def _add(self, name: str, forward: int, backward: int) -> None:
        part = part_of(name)
        part = "language" if part == "lora" else part
        self.flops.forward[part] += forward
        self.flops.backward[part] += backward
        for inside in _COUNTED_INSIDE:
            if f".mlp.{inside}." in name:
                self.flops.inside[inside] += forward + backward
