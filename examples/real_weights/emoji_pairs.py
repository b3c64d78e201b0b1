"""Pictures and captions: Microsoft's 3-D Fluent emoji, each with the English name that Unicode's CLDR gives it.

The same emoji also as documents of four pictures and names, as questions after Unicode's groups, and as text alone: a
name and what Unicode's people search it by.

Flags and skin tones are left out: they would be near copies of each other on both sides of the split. What remains is
divided by the first code point of each emoji, so that no held-out picture has a sibling (a woman and a man running)
among those for training.
"""

import io
import json
import random
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from megavlm.convert.staging import staged

_DATA = "package/en/data.json"
_MESSAGES = "package/en/messages.json"
_LEFT_OUT_GROUPS = ("component", "flags")
_QUESTION = "What kind of thing is this?"
_IN_A_DOCUMENT = 4
_VARIATION_SELECTOR = "fe0f"


@dataclass(frozen=True)
class Pair:
    """One picture and its caption."""

    code: str
    """Code points in hexadecimal, joined by ``-``."""
    caption: str
    group: str = ""
    """Unicode's, in words: ``food and drink``."""
    tags: tuple[str, ...] = ()
    """Words that it is searched by."""

    @property
    def base(self) -> str:
        """The first code point: the same for all variants of an emoji."""
        return self.code.split("-")[0]


def write_pairs(pictures: Path, labels: Path, target: Path, *, num_valid: int, seed: int) -> tuple[int, int]:
    """Write ``images/*.webp``, captions (``train.jsonl``, ``valid.jsonl``) and, of the same emoji, other kinds of rows.

    ``questions.jsonl`` and ``valid_questions.jsonl`` ask for the group; ``documents.jsonl`` and ``words.jsonl`` are for
    training only. ``valid_other_image.jsonl`` and ``valid_questions_other_image.jsonl`` have the held-out rows, each
    with the picture of another: what the texts give away by themselves.

    Args:
        pictures: tarball of fluent-emoji-3d.
        labels: tarball of emojibase-data.
        target: folder to make; must not exist.
        num_valid: pairs to hold out (more by at most one emoji's variants).
        seed: of the split.

    Returns:
        How many pairs are for training, and how many held out.

    Raises:
        ValueError: a tarball is damaged or another one, or there are too few pairs.
    """
    files = _read_pictures(pictures)
    pairs = [pair for pair in read_pairs(labels) if pair.code in files]
    train, valid = split(pairs, num_valid, seed)
    with staged(target) as folder:
        (folder / "images").mkdir()
        for pair in (*train, *valid):
            (folder / f"images/{pair.code}.webp").write_bytes(files[pair.code])
        half = len(valid) // 2  # not the next one: variants of an emoji stand side by side
        others = valid[half:] + valid[:half]
        for row_of, train_name, valid_name in (
            (_caption, "train", "valid"),
            (_question, "questions", "valid_questions"),
        ):
            _write(folder / f"{train_name}.jsonl", map(row_of, train, train))
            _write(folder / f"{valid_name}.jsonl", map(row_of, valid, valid))
            _write(folder / f"{valid_name}_other_image.jsonl", map(row_of, valid, others))
        _write(folder / "documents.jsonl", map(_document, batched(train, _IN_A_DOCUMENT)))
        _write(folder / "words.jsonl", map(_words, train))
    return len(train), len(valid)


def read_pairs(labels: Path) -> list[Pair]:
    """Read the names of all emoji but those left out, in Unicode's order."""
    archive = _read_members(labels, (_DATA, _MESSAGES))
    groups = {group["order"]: group["key"] for group in json.loads(archive[_MESSAGES])["groups"]}
    entries: list[Mapping[str, Any]] = json.loads(archive[_DATA])
    wanted = [entry for entry in entries if groups.get(entry.get("group"), "component") not in _LEFT_OUT_GROUPS]
    return [
        Pair(
            normal_code(entry["hexcode"]),
            entry["label"],
            groups[entry["group"]].replace("-", " and "),
            tuple(entry.get("tags", ())),
        )
        for entry in wanted
    ]


def normal_code(code: str) -> str:
    """Lower case, without the selector of coloured drawing, which the two packages write in different places."""
    return "-".join(point for point in code.lower().split("-") if point != _VARIATION_SELECTOR)


def split(pairs: Iterable[Pair], num_valid: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Divide pairs into those for training and those held out, all variants of an emoji on the same side.

    Raises:
        ValueError: there are not more pairs than are to be held out.
    """
    by_base: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_base[pair.base].append(pair)
    total = sum(map(len, by_base.values()))
    if not 1 < num_valid < total:
        raise ValueError(f"--num-valid={num_valid}: must be above 1 and below the {total} pairs. Choose another.")
    bases = sorted(by_base)
    random.Random(seed).shuffle(bases)
    train: list[Pair] = []
    valid: list[Pair] = []
    for base in bases:
        (valid if len(valid) < num_valid else train).extend(by_base[base])
    return train, valid


def _read_pictures(path: Path) -> dict[str, bytes]:
    """All pictures by their code. One that is no picture is an error."""
    found = {}
    for name, content in _read_members(path, None).items():
        if not name.endswith(".webp"):
            continue
        try:
            Image.open(io.BytesIO(content)).verify()
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path}: {name} is no picture ({error}). Delete it and run the command again.") from None
        found[normal_code(Path(name).stem)] = content
    return found


def _read_members(path: Path, names: tuple[str, ...] | None) -> dict[str, bytes]:
    """Files of a tarball, all of them without names; nothing is unpacked onto the disk."""
    try:
        with tarfile.open(path) as archive:
            members = [member for member in archive if member.isfile() and (names is None or member.name in names)]
            found = {member.name: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Delete it and run the command again.") from None
    missing = [name for name in names or () if name not in found]
    if missing:
        raise ValueError(f"{path}: has no {missing[0]}. Delete it and run the command again.")
    return found


def batched(pairs: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
    """Divide pairs into groups of neighbours; what is left over at the end is left out."""
    return (pairs[start : start + size] for start in range(0, len(pairs) - size + 1, size))


def _image(pair: Pair) -> str:
    return f"images/{pair.code}.webp"


def _caption(text: Pair, picture: Pair) -> dict[str, Any]:
    """A row in LLaVA's format: caption of the first, picture of the second."""
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text.caption}]
    return {"id": text.code, "image": _image(picture), "conversations": turns}


def _question(text: Pair, picture: Pair) -> dict[str, Any]:
    return {"id": text.code, "image": _image(picture), "question": _QUESTION, "answer": text.group}


def _document(pairs: Sequence[Pair]) -> dict[str, Any]:
    text = " ".join(f"<image> {pair.caption}." for pair in pairs)
    return {"id": pairs[0].code, "images": [_image(pair) for pair in pairs], "text": text}


def _words(pair: Pair) -> dict[str, Any]:
    return {"id": pair.code, "text": f"{pair.caption}: {', '.join(pair.tags)}" if pair.tags else pair.caption}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
