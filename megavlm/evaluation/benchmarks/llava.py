"""Conversations of one's own, as for training: JSONL or a JSON list in any shape that training reads.

The last answer of each is the reference; earlier turns are given as they are. No instruction is added unless asked for.
"""

from collections.abc import Iterator
from dataclasses import replace

from megavlm.data import Conversation, parse_conversation
from megavlm.evaluation.benchmarks.benchmark import Benchmark, BenchmarkFiles
from megavlm.evaluation.benchmarks.reading import read_rows
from megavlm.evaluation.metrics import ExactMatch
from megavlm.evaluation.question import Question


def read_llava(files: BenchmarkFiles, instruction: str) -> Iterator[Question]:
    """Read the file.

    Raises:
        ValueError: a row is malformed.
    """
    for entry in read_rows(files.data):
        conversation = parse_conversation(entry.value, entry.where, files.images)
        *before, asked, answer = conversation.messages
        if instruction:
            asked = replace(asked, parts=(*asked.parts, f"\n{instruction}"))
        yield Question(entry.where, Conversation((*before, asked, answer)), (answer.text,))


LLAVA = Benchmark(read_llava, ExactMatch(), "", max_new_tokens=32)
