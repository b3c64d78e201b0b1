"""A model's parts: what a recipe trains or freezes, what is counted apart, what a checkpoint can lack as a whole."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

PARTS = ("vision", "connector", "cross_attention", "language", "lora", "text")

QFORMER_OUTPUT = "connector.projection."
"""How the keys of the layer between a Q-Former and a language model begin; BLIP-2's first stage has none."""

_CROSS_ATTENTION_MODULES = frozenset(
    {"context_layernorm", "gated_block", "pre_cross_attn_layernorm", "cross_attention", "cross_attn_bda"}
)
_LAYER = re.compile(r"(\w+\.(?:\w+\.)*layers\.)(\d+)")


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to.

    Cross-attention and LoRA live mostly inside the language model's layers, where megatron-core has its place, but are
    parts of their own. So is the Q-Former's text side (``text``), whose feed-forward layers stand in the connector's.

    Args:
        name: of a parameter of a :class:`megavlm.models.vlm.VLM`, or its checkpoint key.
    """
    words = name.split(".")
    if "text_ffn" in words:
        return "text"
    if words[0] in ("vision", "connector"):  # a connector may have cross-attention of its own
        return words[0]
    if "lora" in words:
        return "lora"
    return "cross_attention" if _CROSS_ATTENTION_MODULES.intersection(words) else words[0]


@dataclass(frozen=True)
class Trainable:
    """Which parameters of a model train: whole parts, or some modules of them."""

    parts: frozenset[str]
    """Of :data:`PARTS`."""
    within: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Part -> modules of it that train while its others are frozen: names below the part, word by word, with ``*`` for
    any text and ``42-44`` for a range of numbers (``decoder.layers.42-44``). Layers count from 0 in the whole model."""

    def __contains__(self, name: str) -> bool:
        """Whether a parameter trains, by its name in the whole model (:func:`parameters_by_name`)."""
        part = part_of(name)
        if part not in self.parts:
            return False
        return part not in self.within or any(self.matches(pattern, name) for pattern in self.within[part])

    def is_whole(self, part: str) -> bool:
        """Whether every parameter of a part trains."""
        return part in self.parts and part not in self.within

    @staticmethod
    def matches(pattern: str, name: str) -> bool:
        """Whether a parameter lies in a module of :attr:`within`."""
        wanted, words = pattern.split("."), name.split(".")[1:]
        return len(wanted) <= len(words) and all(map(_word_matches, wanted, words))


def _word_matches(wanted: str, word: str) -> bool:
    if bounds := re.fullmatch(r"(\d+)-(\d+)", wanted):
        return word.isdecimal() and int(bounds[1]) <= int(word) <= int(bounds[2])
    return fnmatchcase(word, wanted)


def parameters_by_name(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Go through the parameters of a model chunk, with the names that they have in the whole model.

    A pipeline stage counts its layers from 0; here they have their numbers in the model.
    """
    for name, parameter in chunk.named_parameters():
        found = _LAYER.match(name)
        number = getattr(chunk.get_submodule(found[0]), "layer_number", None) if found else None
        yield (name if found is None or number is None else f"{found[1]}{number - 1}{name[found.end() :]}"), parameter
