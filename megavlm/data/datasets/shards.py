"""Tar shards in the manner of WebDataset, with an index of byte offsets beside each: random access to their samples."""

import base64
import json
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy

from megavlm.data.conversation import Conversation, ImageRef, Message, parse_conversation
from megavlm.data.datasets.source import BadRowPolicy, SourceConfig
from megavlm.data.grounding import CoordinateStyle

_MEMBERS = Path("sample:")  # where the names of a row's images begin
_OF_MEMBER = f"{_MEMBERS}/"
_NUM_LISTED = 10
_BLOCK = 512
_TEXT_NAMES = ("json", "txt")
_NOT_IMAGES = ("json", "txt", "cls", "npy", "pth", "wav", "mp3", "mp4")

_Integers = numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]


class ShardsDatasetConfig(SourceConfig):
    """Tar files, each with its index ``*.tar.idx``, as ``megavlm data prepare`` or ``energon prepare`` leaves them.

    A sample is a ``.json`` of any shape that ``parse_conversation`` reads, which names its images by what their files
    are called behind the sample's key (``0.jpg``), or names none: then all images of the sample, in order. A list is
    taken for ``conversations``, a ``.txt`` for the caption of the sample's image, or for a document.
    """

    kind: Literal["shards"] = "shards"
    path: Path
    """The folder with the tar files (those in folders below it too), or one tar file."""
    keep: Path | None = None
    """A file that names the samples to use, one a line (``shard-000000.tar[17]``), as ``megavlm data filter`` writes;
    None: all."""
    bad_rows: BadRowPolicy = "error"
    """What to do, at opening, with shards that are damaged: ``error`` stops, ``skip`` leaves the whole shard out."""

    def build(self) -> "ShardsDataset":
        """Read the indices."""
        return ShardsDataset(self)


class ShardsDataset:
    """Samples of shards by number. Memory holds where each begins; a sample is read when it is wanted.

    Opening reads the indices and looks at the sizes of the files, not at the samples: one that is damaged is reported
    where it is used.
    """

    def __init__(self, config: ShardsDatasetConfig) -> None:
        """Read the indices.

        Raises:
            ValueError: there are no shards, an index is missing or does not fit (unless ``bad_rows`` is ``skip``), or
                ``keep`` names samples that are not there.
        """
        self._config = config
        self._root = config.path if config.path.is_dir() else config.path.parent
        self.num_bad_rows = 0
        self.bad_rows: list[str] = []
        self._paths: list[Path] = []
        offsets: list[_Integers] = []
        for path in _find_shards(config.path):
            try:
                found = _read_index(path)
            except ValueError as error:
                if config.bad_rows == "error":
                    raise
                self.num_bad_rows += 1
                self.bad_rows = [*self.bad_rows, str(error)][:_NUM_LISTED]
                continue
            self._paths.append(path)
            offsets.append(found)
        counts = [len(found) - 1 for found in offsets]
        self._firsts = numpy.concatenate([[0], numpy.cumsum(counts, dtype=numpy.int64)]).astype(numpy.int64)
        self._offsets = numpy.concatenate([numpy.zeros(0, numpy.int64), *(found[:-1] for found in offsets)])
        self._ends = numpy.concatenate([numpy.zeros(0, numpy.int64), *(found[1:] for found in offsets)])
        self._numbers = self._chosen(config)
        if len(self._numbers) == 0:
            listed = "".join(f"\n  {line}" for line in self.bad_rows)
            raise ValueError(f"dataset.path={config.path}: has no usable sample. Check the folder.{listed}")

    def __len__(self) -> int:
        """Usable samples."""
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[str, Conversation]:
        """See :class:`megavlm.data.datasets.Dataset`."""
        number = int(self._numbers[index])
        path, name = self._place(number)
        where = str(path.parent / name.rpartition("/")[2])
        start, end = int(self._offsets[number]), int(self._ends[number])
        try:
            with open(path, "rb") as file:
                file.seek(start)
                block = file.read(end - start)
        except OSError as error:
            raise ValueError(f"{where}: cannot be read any more ({error.strerror}).") from None
        members = _read_members(block, end - start, where)
        return where, _conversation(members, where, self._config.coordinate_style)

    def sample_name(self, index: int) -> str:
        """The name of a sample in a ``keep`` file."""
        return self._place(int(self._numbers[index]))[1]

    def _place(self, number: int) -> tuple[Path, str]:
        """The shard of a sample, and the sample's name."""
        shard = int(numpy.searchsorted(self._firsts, number, side="right")) - 1
        path = self._paths[shard]
        return path, f"{path.relative_to(self._root).as_posix()}[{number - int(self._firsts[shard])}]"

    def _chosen(self, config: ShardsDatasetConfig) -> _Integers:
        total = int(self._firsts[-1])
        if config.keep is None:
            return numpy.arange(min(total, config.limit or total), dtype=numpy.int64)
        try:
            wanted = dict.fromkeys(config.keep.read_text(encoding="utf-8").split("\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"dataset.keep={config.keep}: cannot be read ({error}). Check the path.") from None
        wanted.pop("", None)
        numbers = [number for number in range(total) if self._place(number)[1] in wanted]
        if len(numbers) != len(wanted):
            present = {self._place(number)[1] for number in numbers}
            first = next(name for name in wanted if name not in present)
            raise ValueError(
                f"dataset.keep={config.keep}: names {len(wanted)} samples, and {len(numbers)} of them are in "
                f"dataset.path={config.path}; not {first!r}. Give the file that was made for this folder."
            )
        return numpy.array(numbers[: config.limit], dtype=numpy.int64)


def _find_shards(path: Path) -> list[Path]:
    if path.is_dir():
        shards = sorted(path.rglob("*.tar"))
        if shards:
            return shards
        raise ValueError(f"dataset.path={path}: holds no .tar file. Make shards with `megavlm data prepare`.")
    if not path.is_file():
        raise ValueError(f"dataset.path={path}: is no folder and no file. Check the path.")
    return [path]


def _read_index(path: Path) -> _Integers:
    """Offsets of the samples of a shard, and the end of the last: ``[samples + 1]`` int64."""
    index = path.with_name(f"{path.name}.idx")
    try:
        content, size = index.read_bytes(), path.stat().st_size
    except FileNotFoundError:
        raise ValueError(
            f"{path}: has no index {index.name} beside it. Make it with `energon prepare`, or the shards anew with "
            "`megavlm data prepare`."
        ) from None
    except OSError as error:
        raise ValueError(f"{index}: cannot be read ({error.strerror}).") from None
    if len(content) % 8 or len(content) < 16:
        raise ValueError(f"{index}: has {len(content)} bytes, and an index is two or more numbers of 8. Make it anew.")
    offsets = numpy.frombuffer(content, dtype="<u8").astype(numpy.int64)
    steps = numpy.diff(offsets)
    if offsets[0] < 0 or (steps < _BLOCK).any() or (offsets % _BLOCK).any():
        raise ValueError(f"{index}: its offsets are no places of a tar file. Make it anew.")
    if offsets[-1] > size:
        raise ValueError(f"{path}: has {size} bytes, and its index reaches to {offsets[-1]}. It was cut off.")
    return offsets


def _read_members(block: bytes, size: int, where: str) -> dict[str, bytes]:
    """The files of one sample, by what their names have behind the key."""
    if len(block) != size:
        raise ValueError(f"{where}: the shard ends after {len(block)} of the sample's {size} bytes.")
    members: dict[str, bytes] = {}
    keys = set()
    end = 0
    try:
        with tarfile.open(fileobj=BytesIO(block), mode="r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if not member.isreg() or member.issparse() or member.size < 0 or end > size:
                    raise ValueError(f"{where}: {member.name[:100]!r} is no whole file of the shard.")
                folder, slash, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                keys.add(folder + slash + key)
                members[kind.lower()] = block[member.offset_data : member.offset_data + member.size]
    except (tarfile.TarError, UnicodeError, EOFError, IndexError, OverflowError) as error:
        raise ValueError(f"{where}: is no part of a tar file ({type(error).__name__}: {error}).") from None
    if len(keys) != 1 or any(block[end:]):
        raise ValueError(f"{where}: the index does not fit the shard, or the shard is damaged.")
    return members


def _conversation(members: dict[str, bytes], where: str, style: CoordinateStyle) -> Conversation:
    row, is_named = _row(members, where)
    conversation = parse_conversation(row, where, _MEMBERS, coordinate_style=style)
    if not is_named and len(conversation.images) != sum(_is_image(name) for name in members):
        raise ValueError(f"{where}: not every image of the sample is used by its row.")
    messages = tuple(_with_images(message, members, where) for message in conversation.messages)
    return replace(conversation, messages=messages)


def _row(members: dict[str, bytes], where: str) -> tuple[Any, bool]:
    """A sample's row, and whether it names its images itself."""
    name = next((name for name in _TEXT_NAMES if name in members), None)
    if name is None:
        raise ValueError(f"{where}: has no .json and no .txt (files: {', '.join(sorted(members))}).")
    try:
        text = members[name].decode("utf-8")
        row = text if name == "txt" else json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: its .{name} is not UTF-8 text (byte {error.start}).") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: its .json is not valid ({error}).") from None
    images = sorted((member for member in members if _is_image(member)), key=_number_first)
    if name == "txt":
        return ({"caption": row, "image": images} if images else {"text": row}), True
    if isinstance(row, list):
        row = {"conversations": row}
    if not isinstance(row, dict) or not images or _names_images(row):
        return row, True
    return {**row, "image": images}, False


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2] not in _NOT_IMAGES


def _number_first(name: str) -> tuple[int, str]:
    number = name.partition(".")[0]
    return (int(number) if number.isdecimal() else -1, name)


def _names_images(row: dict[str, Any]) -> bool:
    """Whether a row says anything about its images; then the sample's files are looked up by name only."""
    if any(row.get(key) not in (None, "", []) for key in ("image", "images")):
        return True
    turns = row.get("messages", row.get("conversations"))
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(part.get(key) is not None for part in parts for key in ("image", "image_url", "path", "url"))


def _with_images(message: Message, members: dict[str, bytes], where: str) -> Message:
    """The message with the images' bytes in it, as ``data:`` URIs."""

    def with_bytes(part: str | ImageRef) -> str | ImageRef:
        if isinstance(part, str) or part.source.startswith("data:"):
            return part
        name = part.source.removeprefix(_OF_MEMBER)
        content = members.get(name.lower())
        if content is None or not part.source.startswith(_OF_MEMBER):
            raise ValueError(f"{where}: the row names the image {name[:100]!r}, and the sample has no such file.")
        return ImageRef(f"data:image/{name.rpartition('.')[2]};base64,{base64.b64encode(content).decode()}")

    return replace(message, parts=tuple(with_bytes(part) for part in message.parts))
