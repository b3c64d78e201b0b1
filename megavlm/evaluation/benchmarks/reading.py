"""Reads the JSON files of benchmarks; whatever is wrong with one, the error names file, entry and key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

_REMEDY = "Check that the file is the benchmark's own and whole."
_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


class Entry:
    """An object of a JSON file, read key by key."""

    def __init__(self, value: Any, where: str) -> None:
        """Keep the object.

        Args:
            value: what the JSON has.
            where: names it in errors, ``file.json[17]``.

        Raises:
            ValueError: it is no object.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: is {_name(value)}, not an object. {_REMEDY}")
        self.value = value
        self.where = where

    def has(self, key: str) -> bool:
        """Whether the key is there, and not null."""
        return self.value.get(key) is not None

    def fail(self, key: str, problem: str) -> NoReturn:
        """Refuse the value of a key.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.where}.{key}={str(self.value.get(key))[:100]!r}: {problem}")

    def raw(self, key: str) -> Any:
        """The value as it is.

        Raises:
            ValueError: there is none.
        """
        if not self.has(key):
            keys = ", ".join(sorted(map(str, self.value))) or "none"
            raise ValueError(f"{self.where}.{key}: is missing (keys: {keys}). {_REMEDY}")
        return self.value[key]

    def text(self, key: str) -> str:
        """Text, or a number as text; not blank.

        Raises:
            ValueError: it is something else.
        """
        text = _as_text(self.raw(key))
        if text is None:
            self.fail(key, f"is {_name(self.value[key])}, not text. {_REMEDY}")
        if not text.strip():
            self.fail(key, f"is blank. {_REMEDY}")
        return text

    def number(self, key: str) -> int:
        """A whole number, or one written as text.

        Raises:
            ValueError: it is something else.
        """
        text = self.text(key)
        if not text.isdecimal():
            self.fail(key, f"is no whole number. {_REMEDY}")
        return int(text)

    def texts(self, key: str) -> tuple[str, ...]:
        """Texts, or one text alone; at least one says something.

        Raises:
            ValueError: it is something else.
        """
        value = self.raw(key)
        texts = [_as_text(part) for part in (value if isinstance(value, list) else [value])]
        if not any(text and text.strip() for text in texts) or None in texts:
            self.fail(key, f"is not a list of texts of which one says something. {_REMEDY}")
        return tuple(text for text in texts if text is not None)

    def entries(self, key: str) -> "list[Entry]":
        """A list of objects.

        Raises:
            ValueError: it is something else.
        """
        values = self.raw(key)
        if not isinstance(values, list):
            self.fail(key, f"is {_name(values)}, not a list. {_REMEDY}")
        return [Entry(value, f"{self.where}.{key}[{number}]") for number, value in enumerate(values)]


def read_object(path: Path) -> Entry:
    """Read a file that is one JSON object.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    return Entry(_decode(_read(path), str(path)), str(path))


def read_rows(path: Path) -> list[Entry]:
    """Read a file that is one JSON list of objects, or one object a line.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    content = _read(path)
    if content.lstrip().startswith("["):
        rows = [(f"{path}[{number}]", row) for number, row in enumerate(_decode(content, str(path)))]
    else:
        lines = enumerate(content.split("\n"), start=1)
        rows = [(f"{path}:{number}", _decode(line, f"{path}:{number}")) for number, line in lines if line.strip()]
    return [Entry(row, where) for where, row in rows]


def find_image(folder: Path, *names: str) -> str:
    """The first of some names that is a file in the folder; the first name where none is, to be reported as missing."""
    paths = [folder / name for name in names]
    return str(next((path for path in paths[:-1] if path.is_file()), paths[-1] if paths[-1].is_file() else paths[0]))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Check the path.") from None


def _decode(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not valid JSON ({error}). {_REMEDY}") from None


def _as_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _name(value: Any) -> str:
    return _NAMES.get(type(value), f"a number ({value})")
