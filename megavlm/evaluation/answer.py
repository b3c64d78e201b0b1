"""What a model said to a question, and the file that keeps it, so that an interrupted evaluation can go on."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megavlm.checkpoint import durable

ANSWERS_NAME = "answers.jsonl"
_NOTHING = "nothing"


@dataclass(frozen=True)
class Answer:
    """The answer to one question."""

    number: int
    """Place of the question in its evaluation, from 0."""
    key: str
    text: str = ""
    """Empty where the question could not be asked."""
    text_without_image: str | None = None
    """What the model says when every tile is black; None where that was not asked."""
    num_tiles: int | None = None
    """Of all images, thumbnails counted; None where the question could not be asked."""
    num_degraded: int = 0
    """Images that got fewer tiles than the tiling chose, so that the prompt fits."""
    is_cut: bool = False
    """Whether it was still going on at the most tokens."""
    problem: str = ""
    """Why the question could not be asked: image missing, unreadable, prompt too long."""


@dataclass
class AnswerFile:
    """Answers on disk: a line with the settings, then one line for each answer, in the order in which they came.

    Only one process reads and writes it.
    """

    path: Path
    settings: Mapping[str, Any]
    """Everything that the answers depend on, as JSON has it."""
    _file: TextIO | None = field(default=None, init=False)

    def open(self) -> dict[int, Answer]:
        """Make the file, or go on in it.

        Returns:
            The answers that are there, by number. A half-written last line, and questions that could not be asked, are
            not among them: they are asked again.

        Raises:
            ValueError: the file is of other settings, damaged, or cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = durable.whole_lines(self.path)
            answers = self._parse(lines)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--output={self.path.parent}: cannot be written ({error}). Choose another.") from None
        if not lines:
            self._write({"settings": self.settings})
        return answers

    def add(self, answers: Iterable[Answer]) -> None:
        """Append answers; a process that is killed loses at most the line that it was writing."""
        for answer in answers:
            self._write(asdict(answer))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None, "open() comes first"
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def _parse(self, lines: list[bytes]) -> dict[int, Answer]:
        answers: dict[int, Answer] = {}
        for number, line in enumerate(lines, start=1):
            try:
                content = json.loads(line)
                if number == 1:
                    self._check_same(content["settings"])
                    continue
                answer = Answer(**content)
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number}: is no answer ({type(error).__name__}: {error}). Delete the file, or give "
                    "another --output."
                ) from None
            answers[answer.number] = answer
        return {number: answer for number, answer in answers.items() if not answer.problem}

    def _check_same(self, before: Mapping[str, Any]) -> None:
        old, new = _flat(before), _flat(self.settings)
        for key in sorted(old.keys() | new.keys()):
            was, now = old.get(key, _NOTHING), new.get(key, _NOTHING)
            if was != now:
                raise ValueError(
                    f"{self.path}: holds answers with other settings: {key} was {was!r} and is {now!r} now. Give "
                    "another --output, or delete the file."
                )


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Dotted key -> value of a tree of JSON."""
    if isinstance(tree, Mapping) and tree:
        return {
            key: value
            for part, below in tree.items()
            for key, value in _flat(below, f"{name}.{part}" if name else part).items()
        }
    return {name: list(tree) if isinstance(tree, tuple) else tree}
