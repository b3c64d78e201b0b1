"""What a benchmark is: a reader of its own files, its metric and its instruction."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megavlm.evaluation.metrics import Metric
from megavlm.evaluation.question import LeftOut, Question

SINGLE_WORD_OR_PHRASE = "Answer the question using a single word or phrase."
"""LLaVA-1.5's instruction for short answers (arXiv 2310.03744, table 9); Megatron-LM's for VQAv2 and ChartQA."""
SINGLE_WORD_PHRASE_OR_NUMBER = "Answer the question using a single word, phrase, or number."
"""NVLM's for TextVQA, DocVQA and InfographicVQA: Megatron-LM, examples/multimodal/run_text_generation.py."""
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
"""LLaVA-1.5's instruction for multiple choice, as in lmms-eval, VLMEvalKit and Megatron-LM."""


@dataclass(frozen=True)
class BenchmarkFiles:
    """Where a benchmark lies on this machine."""

    data: Path
    """The questions."""
    images: Path
    """Folder that the images' names begin in."""
    annotations: Path | None = None
    """The answers, where they are a file of their own."""
    split: str | None = None
    """Part of the benchmark, where the file or the images' names need it."""


@dataclass(frozen=True)
class Benchmark:
    """One kind."""

    read: Callable[[BenchmarkFiles, str], Iterable[Question | LeftOut]]
    """Reads all questions and puts the given instruction behind each; ``ValueError`` names file, entry and key."""
    metric: Metric
    """What its published figures use."""
    instruction: str
    """The usual one; empty: none."""
    max_new_tokens: int
    takes_annotations: bool = False
    """Whether the answers are in a file of their own."""
    takes_split: bool = False
    """Whether ``split`` means something."""


def with_instruction(question: str, instruction: str) -> str:
    """A question with the instruction on a line of its own."""
    return f"{question}\n{instruction}" if instruction else question


def with_options(question: str, options: Iterable[str]) -> str:
    """A question with its options below it, as ``A. text``."""
    return "\n".join([question, *(f"{chr(ord('A') + number)}. {text}" for number, text in enumerate(options))])
