"""Which models go into a soup. The three ways are POINTS' (arXiv 2409.04828, section 3.4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Method = Literal["average", "maximum", "greedy"]
METHODS: dict[str, str] = {
    "average": "the mean of all",
    "maximum": "the mean of the best few by their own scores",
    "greedy": "best first, each kept only if the mean scores no worse with it",
}
"""Method -> what it does."""


@dataclass(frozen=True)
class Candidate:
    """A model that may go into the soup."""

    name: str
    score: float | None
    """Its own; None: not known."""


@dataclass(frozen=True)
class Trial:
    """A soup that was scored while choosing."""

    members: tuple[str, ...]
    score: float
    kept: bool
    """Whether the choice went on with it."""


@dataclass(frozen=True)
class Choice:
    """What goes in."""

    members: tuple[int, ...]
    """Places in the list of candidates, in the order in which they went in."""
    score: float | None
    """Of the soup; None: not measured."""
    trials: tuple[Trial, ...] = ()


def choose_maximum(candidates: Sequence[Candidate], top: int, *, lower_is_better: bool = False) -> Choice:
    """Take the best few. Of equal scores the one that was named first is better.

    Raises:
        ValueError: fewer are there, or one has no score.
    """
    if not 1 <= top <= len(candidates):
        raise ValueError(f"--top={top}: there are {len(candidates)} models. Choose 1 to {len(candidates)}.")
    return Choice(tuple(_ranked(candidates, lower_is_better)[:top]), None)


def choose_greedily(
    candidates: Sequence[Candidate], score: Callable[[tuple[int, ...]], float], *, lower_is_better: bool = False
) -> Choice:
    """Begin with the best model; go through the others, best first, and keep each with which the mean scores no worse.

    Args:
        candidates: all with scores.
        score: measures the mean of some of them, given their places in the list.
        lower_is_better: of scores such as a loss.

    Raises:
        ValueError: a candidate has no score.
    """
    first, *others = _ranked(candidates, lower_is_better)
    members: tuple[int, ...] = (first,)
    best = candidates[first].score
    assert best is not None
    trials = []
    for other in others:
        tried = (*members, other)
        reached = score(tried)
        kept = reached <= best if lower_is_better else reached >= best
        trials.append(Trial(tuple(candidates[place].name for place in tried), reached, kept))
        if kept:
            members, best = tried, reached
    return Choice(members, best, tuple(trials))


def _ranked(candidates: Sequence[Candidate], lower_is_better: bool) -> list[int]:
    scores = []
    for candidate in candidates:
        if candidate.score is None:
            raise ValueError(
                f"{candidate.name}: has no score, by which the best are chosen. Evaluate it, or give --score-command."
            )
        scores.append(candidate.score)
    return sorted(range(len(scores)), key=lambda place: scores[place], reverse=not lower_is_better)
