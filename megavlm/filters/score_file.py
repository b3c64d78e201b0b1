"""The scores of a filter on disk, so that an interrupted one goes on where it was."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from megavlm.checkpoint import durable

SCORES_NAME = "scores.jsonl"


class ScoreFile:
    """A line with the settings, then a line for each sample: ``number``, ``key``, and what the filter found.

    Only one process reads and writes it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Name the folder, and everything that the scores depend on."""
        self.path = folder / SCORES_NAME
        self._settings = json.loads(json.dumps(settings))
        self._file: TextIO | None = None

    def open(self) -> dict[int, dict[str, Any]]:
        """Make the file, or go on in it.

        Returns:
            What is there, by number; a half-written last line is cut off.

        Raises:
            ValueError: the file is of other settings, damaged, or cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = durable.whole_lines(self.path)
            found = self._parse(lines)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--out={self.path.parent}: cannot be written ({error}). Choose another.") from None
        if not lines:
            self.add([{"settings": self._settings}])
        return found

    def add(self, scores: Iterable[Mapping[str, Any]]) -> None:
        """Append; a process that is killed loses at most the line that it was writing."""
        assert self._file is not None, "open() comes first"
        for score in scores:
            self._file.write(json.dumps(score) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _parse(self, lines: list[bytes]) -> dict[int, dict[str, Any]]:
        found = {}
        settings: Mapping[str, Any] = self._settings
        for place, line in enumerate(lines, start=1):
            try:
                content = json.loads(line)
                if place == 1:
                    settings = content["settings"]
                else:
                    found[int(content["number"])] = content
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{place}: is no score ({type(error).__name__}: {error}). Delete the file, or give "
                    "another --out."
                ) from None
        self._check_same(settings)
        return found

    def _check_same(self, before: Mapping[str, Any]) -> None:
        for key in sorted(before.keys() | self._settings.keys()):
            was, now = before.get(key), self._settings.get(key)
            if was != now:
                raise ValueError(
                    f"--out={self.path.parent}: holds scores with other settings: {key} was {was!r} and is {now!r} "
                    "now. Give another folder, or delete it."
                )
