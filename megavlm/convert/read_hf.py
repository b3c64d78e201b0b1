"""A Hugging Face folder: its ``config.json``, and its tensors, each read when it is asked for. safetensors only."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # what the safetensors library allows
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class PublishedFolder(Mapping[str, Tensor]):
    """The tensors of a folder by their names. What can be checked without reading them is checked first."""

    def __init__(self, path: Path) -> None:
        """Read the configuration and the headers of all files.

        Raises:
            ValueError: it is no model's folder, holds pickles only, or a file is missing, damaged or cut short.
        """
        self.path = path
        self.config = read_json(path / CONFIG_NAME)
        self._files: dict[str, Path] = {}
        self._templates: dict[str, Tensor] = {}
        for file in self._find_files():
            for name, template in read_header(file).items():
                if name in self._files:
                    raise ValueError(f"{file}: holds {name}, and so does {self._files[name].name}. Remove one of them.")
                self._files[name], self._templates[name] = file, template
        self._check_index()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            KeyError: the folder has none of that name.
            ValueError: its file cannot be read.
        """
        return read_tensor(self._files[name], name)

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Tensors on the ``meta`` device with the names, shapes and dtypes of the folder's."""
        return self._templates

    def _find_files(self) -> list[Path]:
        if (self.path / INDEX_NAME).exists():
            files = [self.path / name for name in sorted(set(self._index().values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ValueError(
                    f"{self.path}: {len(missing)} of the {len(files)} files that {INDEX_NAME} names are missing, first "
                    f"{missing[0]}. Download them."
                )
            return files
        if (self.path / _SINGLE_NAME).is_file():
            return [self.path / _SINGLE_NAME]
        pickles = sorted(file.name for pattern in _PICKLES for file in self.path.glob(pattern))
        if pickles:
            raise ValueError(
                f"{self.path}: holds its weights as pickles ({pickles[0]}), which are programs and are not opened. "
                "Convert them to safetensors first (save_pretrained of transformers writes them)."
            )
        raise ValueError(f"{self.path}: has a {CONFIG_NAME} but no {_SINGLE_NAME} and no {INDEX_NAME}. Download them.")

    def _index(self) -> dict[str, str]:
        path = self.path / INDEX_NAME
        names = read_json(path).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()) or not names:
            raise ValueError(f"{path}: has no weight_map of names to files. Download it again.")
        outside = next((name for name in names.values() if Path(name).name != name), None)
        if outside is not None:
            raise ValueError(f"{path}: names {outside!r}, which is not a file of the folder. Download it again.")
        return names

    def _check_index(self) -> None:
        if not (self.path / INDEX_NAME).exists():
            return
        for name, file in self._index().items():
            if self._files.get(name) != self.path / file:
                raise ValueError(f"{self.path / file}: lacks {name}, which {INDEX_NAME} says it holds. Copy it again.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        ValueError: it is missing, cannot be read, is damaged or holds something else.
    """
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing, so {path.parent} is not a model's folder. Check the path.") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). Check the path.") from None
    except ValueError as error:
        raise ValueError(f"{path}: is damaged ({error}). Copy it again.") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, not a mapping. Copy it again.")
    return tree


def read_tensor(path: Path, name: str) -> Tensor:
    """Read a tensor of a safetensors file.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            return tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {name} cannot be read ({error}). Copy the file again.") from None


def read_header(path: Path) -> dict[str, Tensor]:
    """Read names, shapes and dtypes of a safetensors file, after checking that the file is as long as they say.

    Format: 8 bytes with the header's length (little endian), the header (JSON), the tensors' bytes.

    Returns:
        Tensors on the ``meta`` device by name.

    Raises:
        ValueError: the file is damaged or cut short, or a dtype is unknown.
    """
    remedy = "Copy it again."
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES + length or length > _MOST_HEADER_BYTES:
            raise ValueError(f"{path}: has {size} bytes and announces a header of {length}: it is cut short. {remedy}")
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        kinds = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its header is damaged ({type(error).__name__}: {error}). {remedy}") from None
    if size != _LENGTH_BYTES + length + end:
        raise ValueError(f"{path}: has {size} bytes, and should have {_LENGTH_BYTES + length + end}. {remedy}")
    unknown = next((f"{name} is of type {dtype}" for name, (dtype, _) in kinds.items() if dtype not in _DTYPES), None)
    if unknown is not None:
        raise ValueError(f"{path}: {unknown}, which is not one of {', '.join(_DTYPES)}. Save it as bf16 or fp32.")
    return {name: torch.empty(shape, dtype=_DTYPES[dtype], device="meta") for name, (dtype, shape) in kinds.items()}
