"""Answers to prompts: one, a file of them, or a conversation in the terminal."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from rich.progress import Progress

from megavlm.build import Parts
from megavlm.checkpoint.agreement import agreed
from megavlm.data import Conversation, ImageRef, Message, Sample, SampleError
from megavlm.data.conversation import parse_conversation
from megavlm.inference.generate import GREEDY, generate, stream
from megavlm.inference.sampling import Sampling
from megavlm.inference.shared import Done, answer_shared
from megavlm.inference.text_stream import TextStream
from megavlm.runtime.log import LOGGER

HELP = "/image PATH shows an image with the next message, /clear begins anew, /exit ends."


@dataclass(frozen=True)
class Settings:
    """How answers are generated."""

    max_new_tokens: int = 256
    sampling: Sampling = GREEDY


def ask(
    parts: Parts, conversation: Conversation, settings: Settings, say: Callable[[str], None] = lambda text: None
) -> str:
    """Answer the last user turn of a conversation. All ranks call it; all get the same answer.

    Args:
        parts: with a wrapped model.
        conversation: ends with the user.
        settings: how.
        say: is given the text as it comes.

    Raises:
        ValueError: an image cannot be used, or the prompt is too long.
    """
    try:
        prompt = parts.processor.prompt("prompt", conversation).sample
    except SampleError as error:
        raise ValueError(f"prompt: {error.skipped.reason}: {error.skipped.message}") from None
    text = TextStream(parts.tokenizer)
    pieces = []
    for [tokens] in stream(parts, [prompt], max_new_tokens=settings.max_new_tokens, sampling=settings.sampling):
        for token in tokens:
            pieces.append(text.add(token))
            say(pieces[-1])
    pieces.append(text.end())
    say(pieces[-1])
    return "".join(pieces)


def user_turn(text: str, images: Sequence[str]) -> Message:
    """A message with its images before the text, each on a line of its own."""
    shown: list[str | ImageRef] = [part for image in images for part in (ImageRef(image), "\n")]
    return Message("user", (*shown, text))


def chat(parts: Parts, settings: Settings, *, is_reader: bool) -> None:
    """Talk in the terminal until the user ends it. All ranks call it; one reads and writes."""
    messages: list[Message] = []
    images: list[str] = []
    if is_reader:
        print(HELP)
    while (line := _from_reader(is_reader)) is not None:
        command, _, argument = line.partition(" ")
        if command == "/clear":
            messages, images = [], []
        elif command == "/image":
            images.append(argument.strip())
        elif command.startswith("/"):
            _tell(f"{command}: is no command. {HELP}", is_reader)
        elif line:
            asked = [*messages, user_turn(line, images)]
            try:
                answer = ask(parts, Conversation(tuple(asked)), settings, writer(is_reader))
            except ValueError as problem:
                _tell(str(problem), is_reader)
            else:
                _tell("", is_reader)
                messages = [*asked, Message("assistant", (answer,))]
            images = []


def _from_reader(is_reader: bool) -> str | None:
    """The next line that the user types, on all ranks; None at the end."""
    line: list[str | None] = [None]
    if is_reader:
        try:
            line = [input("> ").strip()]
        except EOFError:
            line = [None]
        if line == ["/exit"]:
            line = [None]
    torch.distributed.broadcast_object_list(line, src=0)
    return line[0]


def writer(is_reader: bool) -> Callable[[str], None]:
    """Return what prints text as it comes, on the one rank that speaks."""

    def say(text: str) -> None:
        if is_reader:
            print(text, end="", flush=True)

    return say


def _tell(text: str, is_reader: bool) -> None:
    if is_reader:
        print(text, flush=True)


def answer_file(
    parts: Parts, source: Path, output: Path, settings: Settings, *, batch_size: int, is_writer: bool
) -> None:
    """Answer every row of a JSONL file of conversations that end with the user. All ranks call it.

    ``output`` gets a line for each row, in order: its key, the prompt's text, and ``answer``, or ``error`` where the
    row cannot be used. An assistant's last turn is left out of the prompt and kept as ``reference``.

    Args:
        parts: with a wrapped model.
        source: the file; images are relative to its folder.
        output: written as answers come.
        settings: how.
        batch_size: prompts at a time on each data-parallel rank.
        is_writer: whether this rank writes (rank 0).

    Raises:
        ValueError: the file cannot be read, or the output exists.
    """
    try:
        rows = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--jsonl={source}: cannot be read ({error}). Check the path.") from None
    file = _RowFile(parts, source, rows, settings)
    num_written = num_unusable = 0
    waiting: dict[int, dict[str, Any]] = {}  # answered before a row above them
    with agreed(f"writing {output}"):
        opened = _opened(output, is_writer)
    with opened as out, Progress(disable=not (is_writer and sys.stdout.isatty())) as progress:
        task = progress.add_task("answering", total=len(rows))
        for came in answer_shared(parts, range(len(rows)), file.read, file.answer, batch_size=batch_size):
            waiting |= dict(came)
            while num_written in waiting:
                result = waiting.pop(num_written)
                num_unusable += "error" in result
                if out is not None:
                    out.write(json.dumps(result, ensure_ascii=False) + "\n")
                    out.flush()
                num_written += 1
            progress.update(task, completed=num_written)
    LOGGER.info("%d answers in %s, %d unusable rows", len(rows) - num_unusable, output, num_unusable)


def _opened(output: Path, is_writer: bool) -> Any:
    if not is_writer:
        return contextlib.nullcontext()
    try:
        return output.open("x", encoding="utf-8")
    except FileExistsError:
        raise ValueError(f"--output={output}: exists. Delete it or choose another name.") from None
    except OSError as error:
        raise ValueError(f"--output={output}: cannot be written ({error.strerror}). Choose another name.") from None


@dataclass
class _RowFile:
    """The rows of a file: as prompts, and with their answers as what is written."""

    parts: Parts
    source: Path
    rows: Sequence[str]
    settings: Settings
    _asked: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Of each row that was read and not yet answered: what is written beside the answer."""

    def read(self, number: int) -> Sample | Done[dict[str, Any]]:
        """The prompt of a row, or why it has none."""
        where = f"{self.source.name}:{number + 1}"
        try:
            row = json.loads(self.rows[number])
            conversation = parse_conversation(row, where, self.source.parent, needs_answer=False)
            prompt = self.parts.processor.prompt(where, conversation)
        except (ValueError, SampleError) as error:
            return Done({"key": where, "error": str(error)})
        users = [message.text for message in conversation.messages if message.role == "user"]
        self._asked[number] = {"key": where, "prompt": users[-1].strip()}
        if prompt.reference_answer:
            self._asked[number]["reference"] = prompt.reference_answer
        return prompt.sample

    def answer(self, prompts: Sequence[tuple[int, Sample]]) -> list[dict[str, Any]]:
        """What is written for some rows."""
        samples = [sample for _, sample in prompts]
        answers = generate(
            self.parts, samples, max_new_tokens=self.settings.max_new_tokens, sampling=self.settings.sampling
        )
        return [
            {**self._asked.pop(number), "answer": self.parts.tokenizer.decode(ids)}
            for (number, _), ids in zip(prompts, answers, strict=True)
        ]
