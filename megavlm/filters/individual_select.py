"""Chooses data sets one by one: each stays if the score of what is chosen rises with it.

Source: Individual Select of POINTS (arXiv 2409.04828). A score comes from a table, or from a command that trains on the
chosen data sets and evaluates: ``megavlm eval --output FOLDER`` leaves ``evaluation.json`` with it.
"""

import json
import math
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import matplotlib.pyplot as plt
import pydantic

from megavlm.checkpoint import durable
from megavlm.config import Config
from megavlm.filters.score_file import ScoreFile

matplotlib.use("Agg")  # no screen on a cluster

CHOICE_NAME = "choice.json"

_JOINT = "+"


class SelectionConfig(Config):
    """A file that says what to choose from."""

    start: list[str] = []
    """Data sets that are always in."""
    candidates: list[str] = pydantic.Field(min_length=1)
    """Data sets that may join, in this order."""
    order: Literal["given", "best"] = "given"
    """``given``: each candidate once, in their order; ``best``: in each round all that are left are tried, and the best
    joins, until none is better."""
    min_gain: pydantic.NonNegativeFloat = 0.0
    """A candidate joins if the score rises by more than this."""
    table: dict[str, float] | None = None
    """Scores that are known: of ``a+b`` for the data sets a and b together, in any order."""
    command: str | None = None
    """What makes the score of others: run without a shell; ``{names}`` are the data sets, joined by ``+``, and
    ``{folder}`` is a folder for its results."""
    score_file: str = "evaluation.json"
    """In that folder: JSON."""
    score_key: str = "score.value"
    """Where the score stands in it, keys joined by dots."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> "SelectionConfig":
        names = [*self.start, *self.candidates]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"candidates: {', '.join(twice)} stand(s) twice in start and candidates")
        if bad := [name for name in names if _JOINT in name or not name]:
            raise ValueError(f"candidates: {bad[0]!r} is empty or has a {_JOINT!r}. Choose another name")
        if self.table is None and self.command is None:
            raise ValueError("table=None: neither table nor command says where scores come from. Give one or both")
        return self


def select_datasets(config: SelectionConfig, folder: Path, say: Callable[[str], None] = lambda text: None) -> list[str]:
    """Choose data sets, and write every trial to ``scores.jsonl``, the choice to ``choice.json``, and a picture.

    Args:
        config: what to choose from.
        folder: where to; trials that are there are not made again.
        say: is told each trial.

    Returns:
        Names of the chosen data sets, those it started with first.

    Raises:
        ValueError: a score is missing, the command fails, or the folder cannot be written or holds other trials.
    """
    trials = _Trials(config, folder, say)
    try:
        chosen = list(config.start)
        best = trials.score(chosen) if chosen else -math.inf
        left = list(config.candidates)
        while left:
            tried = left[:1] if config.order == "given" else left
            scores = {name: trials.score([*chosen, name]) for name in tried}
            winner = max(tried, key=lambda name: scores[name])  # of equal ones the first
            if scores[winner] > best + config.min_gain:
                chosen.append(winner)
                best = scores[winner]
                left.remove(winner)
            elif config.order == "best":
                break
            else:
                left.remove(winner)
    finally:
        trials.close()
    tree = {"chosen": chosen, "score": best if math.isfinite(best) else None, "trials": trials.made}
    durable.replace_file(folder / CHOICE_NAME, (json.dumps(tree, indent=1) + "\n").encode())
    _draw(folder / "report.png", trials.made, chosen)
    return chosen


class _Trials:
    """Scores of sets of data sets, each made once."""

    def __init__(self, config: SelectionConfig, folder: Path, say: Callable[[str], None]) -> None:
        self._config = config
        self._folder = folder
        self._say = say
        # a table may grow and candidates may join: trials that were made stay what they are
        settings = config.model_dump(include={"command", "score_file", "score_key"})
        self._file = ScoreFile(folder, {"filter": "individual-select", **settings})
        self._known = {_name(entry["names"]): entry["score"] for entry in self._file.open().values()}
        self._table = {_name(key.split(_JOINT)): score for key, score in (config.table or {}).items()}
        self.made: list[dict[str, Any]] = []

    def score(self, names: Sequence[str]) -> float:
        """The score of some data sets together."""
        name = _name(names)
        if name in self._table:
            score, origin = self._table[name], "table"
        elif name in self._known:
            score, origin = self._known[name], "an earlier call"
        else:
            score, origin = self._run(names), "command"
            self._file.add([{"number": len(self._known), "key": name, "names": list(names), "score": score}])
            self._known[name] = score
        self._say(f"{_JOINT.join(names)}: {score:g} ({origin})")
        self.made.append({"names": list(names), "score": score})
        return score

    def close(self) -> None:
        self._file.close()

    def _run(self, names: Sequence[str]) -> float:
        name = _name(names)
        if self._config.command is None:
            raise ValueError(f"table: has no score of {name!r}, and there is no command to make it. Add it.")
        out = self._folder / "trials" / f"{len(self._known):03d}"
        out.mkdir(parents=True, exist_ok=True)
        places = {"{names}": _JOINT.join(names), "{folder}": str(out)}
        words = shlex.split(self._config.command)
        for place, value in places.items():
            words = [word.replace(place, value) for word in words]
        try:
            with open(out / "output.txt", "wb") as output:
                code = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        except OSError as error:
            raise ValueError(f"command={words[0]!r}: cannot be run ({error.strerror}). Check its path.") from None
        if code:
            raise ValueError(f"command: ends with {code} for {name!r}; what it says is in {out / 'output.txt'}.")
        return _read_score(out / self._config.score_file, self._config.score_key)


def _read_score(path: Path, key: str) -> float:
    try:
        value = json.loads(path.read_bytes())
        for part in key.split("."):
            value = value[part]
    except OSError as error:
        raise ValueError(f"score_file={path}: cannot be read ({error.strerror}). Let the command write it.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"score_key={key}: is not in {path} ({type(error).__name__}: {error}).") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"score_key={key}: is {value!r} in {path}, not a number.")
    return float(value)


def _name(names: Sequence[str]) -> str:
    return _JOINT.join(sorted(names))


def _draw(path: Path, made: Sequence[Mapping[str, Any]], chosen: Sequence[str]) -> None:
    """The score of every trial, in their order; those that were kept are filled."""
    kept = [_name(chosen[: count + 1]) for count in range(len(chosen))]
    figure, axes = plt.subplots(figsize=(max(5.0, 0.7 * len(made) + 2), 4.2), layout="constrained")
    colours = ["tab:green" if _name(trial["names"]) in kept else "lightgrey" for trial in made]
    axes.bar(range(len(made)), [trial["score"] for trial in made], color=colours, edgecolor="black", linewidth=0.6)
    labels = [f"+ {trial['names'][-1]}" if number else _JOINT.join(trial["names"]) for number, trial in enumerate(made)]
    axes.set_xticks(range(len(made)), labels, rotation=60, ha="right", fontsize=8)
    scores = [trial["score"] for trial in made]
    spread = max(scores) - min(scores) or 1.0
    axes.set_ylim(min(scores) - 0.15 * spread, max(scores) + 0.15 * spread)
    axes.set_ylabel("score")
    axes.set_title("green: joined what is chosen; grey: tried and left out", fontsize=9)
    figure.savefig(path, dpi=80)
    plt.close(figure)
