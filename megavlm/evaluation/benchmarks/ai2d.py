"""AI2D: multiple choice questions about school diagrams.

Two formats, JSON list or one object a line. lmms-lab/ai2d, whose images are saved beside it: ``image``, ``question``,
``options`` (texts), ``answer`` (the right one's index, from 0). InternVL's ``test_vlmevalkit.jsonl``: ``image``,
``question`` with the options in it as lines ``A. text`` and often an instruction after them, ``answer`` (a letter),
``question_id``; such a text is asked as it is, and gets the instruction only if it has none.
"""

import re
import string
from collections.abc import Iterator

from megavlm.data import Conversation
from megavlm.evaluation.benchmarks.benchmark import (
    OPTION_LETTER,
    Benchmark,
    BenchmarkFiles,
    with_instruction,
    with_options,
)
from megavlm.evaluation.benchmarks.reading import Entry, find_image, read_rows
from megavlm.evaluation.metrics import MultipleChoice
from megavlm.evaluation.question import Question
from megavlm.inference.answer import user_turn

_OPTION = re.compile(r"\(?([A-Z])[.):]\s*(.*\S)\s*")


def read_ai2d(files: BenchmarkFiles, instruction: str) -> Iterator[Question]:
    """Read the file.

    Raises:
        ValueError: an entry is malformed, has no options, or an answer that is none of them.
    """
    for number, entry in enumerate(read_rows(files.data)):
        name = entry.text("image")
        image = find_image(files.images, name, name.rpartition("/")[2])
        text, options = _ask(entry, instruction)
        yield Question(
            entry.text("question_id") if entry.has("question_id") else f"{files.data.name}[{number}]",
            Conversation((user_turn(text, [image]),)),
            (_letter(entry, len(options)),),
            options,
        )


def _ask(entry: Entry, instruction: str) -> tuple[str, tuple[str, ...]]:
    """The text to ask, and the options' texts."""
    question = entry.text("question")
    if entry.has("options"):
        options = entry.texts("options")
        return with_instruction(with_options(question, options), instruction), options
    lines = question.rstrip().splitlines()
    found: list[str] = []
    last = 0
    for place, line in enumerate(lines):
        match = _OPTION.fullmatch(line.strip())
        if match and match.group(1) == string.ascii_uppercase[len(found)]:
            found.append(match.group(2))
            last = place
    if not found:
        entry.fail("question", "there is no key options, and no line such as 'A. text'. Add the options.")
    has_instruction = last < len(lines) - 1
    return (question if has_instruction else with_instruction(question.rstrip(), instruction)), tuple(found)


def _letter(entry: Entry, num_options: int) -> str:
    answer = entry.text("answer").strip()
    letters = string.ascii_uppercase[:num_options]
    if answer.isdecimal() and int(answer) < num_options:
        return letters[int(answer)]
    if len(answer) != 1 or answer not in letters:
        entry.fail("answer", f"is neither an index from 0 to {num_options - 1} nor one of {letters}. Mend the row.")
    return answer


AI2D = Benchmark(read_ai2d, MultipleChoice(), OPTION_LETTER, max_new_tokens=16)
