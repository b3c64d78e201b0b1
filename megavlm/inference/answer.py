"""Answers to prompts: one, a file of them, or a conversation in the terminal."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from rich.progress import Progress

from megavlm.build import Parts
from megavlm.data import Conversation, ImageRef, Message, SampleError
from megavlm.data.conversation import parse_conversation
from megavlm.inference.generate import GREEDY, generate, stream
from megavlm.inference.sampling import Sampling
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
    for [token] in stream(parts, [prompt], max_new_tokens=settings.max_new_tokens, sampling=settings.sampling):
        assert token is not None, "a single row goes on until the stream ends"
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
    size, rank = parts.engine.data_parallel_size, parts.engine.data_parallel_rank
    at_once = batch_size * size
    num_unusable = 0
    with _opened(output, is_writer) as file, Progress(disable=not (is_writer and sys.stdout.isatty())) as progress:
        task = progress.add_task("answering", total=len(rows))
        for start in range(0, len(rows), at_once):
            numbers = range(start, min(start + at_once, len(rows)))
            mine = _answer_rows(parts, source, [(number, rows[number]) for number in numbers[rank::size]], settings)
            gathered = parts.engine.gather_over_replicas(mine)
            for number in numbers:
                result = next(part[number] for part in gathered if number in part)
                num_unusable += "error" in result
                if file is not None:
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
                    file.flush()
            progress.update(task, completed=numbers[-1] + 1)
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


def _answer_rows(
    parts: Parts, source: Path, rows: Sequence[tuple[int, str]], settings: Settings
) -> dict[int, dict[str, Any]]:
    """Answers of some rows by their number."""
    results: dict[int, dict[str, Any]] = {}
    prompts = []
    for number, row in rows:
        where = f"{source.name}:{number + 1}"
        try:
            conversation = parse_conversation(json.loads(row), where, source.parent, needs_answer=False)
            prompt = parts.processor.prompt(where, conversation)
        except (ValueError, SampleError) as error:
            results[number] = {"key": where, "error": str(error)}
            continue
        users = [message.text for message in conversation.messages if message.role == "user"]
        results[number] = {"key": where, "prompt": users[-1].strip()}
        if prompt.reference_answer:
            results[number]["reference"] = prompt.reference_answer
        prompts.append((number, prompt.sample))
    if prompts:
        samples = [sample for _, sample in prompts]
        answers = generate(parts, samples, max_new_tokens=settings.max_new_tokens, sampling=settings.sampling)
        for (number, _), ids in zip(prompts, answers, strict=True):
            results[number]["answer"] = parts.tokenizer.decode(ids)
    return results
