"""Values of a ``config.json``: spelt out, checked, refused."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

Tree = dict[str, Any]

_NO_OTHER = "MegaVLM has no model like that, so the folder cannot be converted."


def with_defaults(kind: type[transformers.PreTrainedConfig], config: Mapping[str, Any], where: str) -> Tree:
    """Return the configuration with every value spelt out, in the spelling of the installed transformers.

    Raises:
        ValueError: ``kind`` does not take it.
    """
    try:
        return dict(kind.from_dict(copy.deepcopy(dict(config))).to_dict())
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: is not one of a {kind.model_type} model ({reason}). Download it again.") from None


def unsupported(config: Mapping[str, Any], allowed: Mapping[str, Sequence[Any]]) -> list[str]:
    """Name each value that is none of those allowed; one that is not given counts as the first of them."""
    return [
        f"{name}={config[name]!r} (supported: {', '.join(map(repr, values))})"
        for name, values in allowed.items()
        if config.get(name, values[0]) not in values
    ]


def refuse(problems: Sequence[str], where: str) -> None:
    """Refuse a configuration.

    Raises:
        ValueError: there are problems; names them all.
    """
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}. {_NO_OTHER}")


def side(config: Mapping[str, Any], name: str, where: str) -> int:
    """Return a size that is one number, or two equal ones.

    Raises:
        ValueError: they differ.
    """
    value = config[name]
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        refuse([f"{name}={value} (supported: squares)"], where)
    return int(sides.pop())
