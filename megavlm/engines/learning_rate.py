"""Learning rates that follow from something else: from the size of the model, or from the peak of the schedule.

A recipe may say them in place of a number. They become numbers when it is read, so that the resolved recipe, the log
and a checkpoint hold the number itself:

    optimizer:
      lr: {law: mm1, num_parameters: 3.0e9}
      min_lr: {times_lr: 0.1}
      weight_decay: {times_lr: 0.1}
"""

import math
from collections.abc import Callable, Mapping
from typing import Any


def mm1_learning_rate(num_parameters: float) -> float:
    """Peak learning rate of MM1's pretraining (arXiv 2403.09611): ``exp(-0.4214 ln N - 0.5535)``.

    It was fitted to grid searches at 9 M, 85 M, 302 M and 1.2 B parameters. The paper's weight decay is a tenth of it.

    Args:
        num_parameters: N, of the dense language model without its embeddings. A model whose layers became experts
            keeps the N of the dense one: MM1 trains both with the same settings.
    """
    return math.exp(-0.4214 * math.log(num_parameters) - 0.5535)


LAWS: dict[str, Callable[[float], float]] = {
    "mm1": mm1_learning_rate,
}
"""Name -> peak learning rate of a number of parameters."""

_SHARES = ("min_lr", "weight_decay")
"""Settings that may be given as a multiple of the peak learning rate."""
_WHERE = "training.optimizer"


def resolve_learning_rate(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's settings with numbers in place of laws.

    Args:
        settings: as a recipe gives them; what is no mapping stays as it is.

    Raises:
        ValueError: a law or a multiple is malformed; names the key.
    """
    resolved = dict(settings)
    if isinstance(resolved.get("lr"), Mapping):
        resolved["lr"] = _apply_law(resolved["lr"])
    for name in _SHARES:
        if isinstance(resolved.get(name), Mapping):
            resolved[name] = _multiply(name, resolved[name], resolved.get("lr"))
    return resolved


def _apply_law(given: Mapping[str, Any]) -> float:
    if set(given) != {"law", "num_parameters"}:
        raise ValueError(
            f"{_WHERE}.lr={dict(given)}: is a law with other keys than it needs. Give a number, or {{law: "
            f"{' or '.join(LAWS)}, num_parameters: N}}."
        )
    law, num_parameters = given["law"], given["num_parameters"]
    if law not in LAWS:
        raise ValueError(f"{_WHERE}.lr.law={law!r}: is no known law. Choose from {', '.join(LAWS)}.")
    if not _is_positive(num_parameters):
        raise ValueError(
            f"{_WHERE}.lr.num_parameters={num_parameters!r}: must be a number above 0, of the parameters of the dense "
            "language model without embeddings, e.g. 3.0e9."
        )
    return LAWS[law](num_parameters)


def _multiply(name: str, given: Mapping[str, Any], learning_rate: Any) -> float:
    if set(given) != {"times_lr"}:
        raise ValueError(
            f"{_WHERE}.{name}={dict(given)}: has other keys than it needs. Give a number, or {{times_lr: 0.1}}."
        )
    factor = given["times_lr"]
    if not _is_positive(factor):
        raise ValueError(f"{_WHERE}.{name}.times_lr={factor!r}: must be a number above 0, e.g. 0.1.")
    if not _is_positive(learning_rate):
        raise ValueError(
            f"{_WHERE}.{name}={dict(given)}: is a multiple of training.optimizer.lr={learning_rate!r}, which is no "
            "number above 0. Give one."
        )
    return factor * learning_rate


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
