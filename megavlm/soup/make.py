"""The ``soup`` verb: from run folders to the run folder of their mean, with a report of how it came about."""

import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from megavlm.checkpoint import RunFolder, find_checkpoint
from megavlm.checkpoint.release import write_release
from megavlm.convert.carried import CARRIED_NAME
from megavlm.convert.own_checkpoint import OwnCheckpoint, open_checkpoint
from megavlm.convert.staging import progress_bar, staged
from megavlm.runtime.log import LOGGER
from megavlm.soup.choice import Candidate, Choice, Method, choose_greedily, choose_maximum
from megavlm.soup.mean import Mean, check_alike, shares
from megavlm.soup.score import ScoreSettings, score_model

REPORT_NAME, TABLE_NAME = "soup.json", "soup.md"


@dataclass(frozen=True)
class SoupSettings:
    """How a soup is made."""

    method: Method = "average"
    weights: tuple[float, ...] | None = None
    """Of the models, with ``average``, up to a common factor; None: all alike."""
    top: int | None = None
    """Models that ``maximum`` takes."""
    score: ScoreSettings = field(default_factory=ScoreSettings)


@dataclass(frozen=True)
class Soup:
    """What was made."""

    checkpoint: Path
    candidates: tuple[Candidate, ...]
    choice: Choice
    shares: tuple[float, ...]
    """Of the members, in the order in which they went in."""


def make_soup(sources: Sequence[Path], target: Path, settings: SoupSettings) -> Soup:
    """Mix models of one architecture into one. Memory holds two tensors at a time.

    Args:
        sources: run folders, of which the newest checkpoint is taken, or checkpoints.
        target: the run folder to make, with ``release/``, ``soup.json`` and ``soup.md``; must not exist.
        settings: how.

    Raises:
        ValueError: an option does not fit, a checkpoint is damaged or not like the others, or a score is missing;
            nothing is left behind.
    """
    _check_options(sources, target, settings)
    given = shares(settings.weights, len(sources)) if settings.method == "average" else None
    checkpoints = [open_checkpoint(source) for source in sources]
    _check_once(checkpoints)
    check_alike(checkpoints)
    candidates = tuple(Candidate(str(one.source), _own_score(one, settings)) for one in checkpoints)

    def mix(folder: Path, members: Sequence[int], named: Path) -> Path:
        return _write(folder, [checkpoints[place] for place in members], given, named)

    def score(members: tuple[int, ...]) -> float:
        folder = target.with_name(f"{target.name}.trial-{secrets.token_hex(4)}")
        try:
            reached = score_model(folder, mix(folder, members, folder), settings.score)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        assert reached is not None  # there is a command
        return reached

    choice = _choose(candidates, score, settings)
    with staged(target) as folder:
        written = mix(folder, choice.members, target)
        soup = Soup(target / written.name, candidates, choice, given or shares(None, len(choice.members)))
        _report(folder, soup, settings)
    return soup


def _check_options(sources: Sequence[Path], target: Path, settings: SoupSettings) -> None:
    if len(sources) < 2:
        raise ValueError(f"runs={', '.join(map(str, sources))}: a soup is of two models or more. Name another.")
    if target.exists() or target.is_symlink():
        raise ValueError(f"target={target}: exists already. Choose another, or remove it.")
    method = settings.method
    if settings.weights is not None and method != "average":
        raise ValueError(f"--weights: belong to --method average, and it is {method}. Leave them out.")
    if (settings.top is None) == (method == "maximum"):
        what = "needs --top, how many of the best to take" if method == "maximum" else "has no --top"
        raise ValueError(f"--method={method}: {what}. {'Give it' if method == 'maximum' else 'Leave it out'}.")
    if method == "greedy" and settings.score.command is None:
        raise ValueError("--method=greedy: scores soups while it chooses. Give --score-command.")


def _check_once(checkpoints: Sequence[OwnCheckpoint]) -> None:
    """Refuse a checkpoint that is named twice, by its run folder and by itself for instance.

    Raises:
        ValueError: there is one.
    """
    places = [one.path.resolve() for one in checkpoints]
    if twice := [one for one, place in zip(checkpoints, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"runs: {twice[0].path} stands twice. Name it once, and give it more of the --weights.")


def _own_score(checkpoint: OwnCheckpoint, settings: SoupSettings) -> float | None:
    """Score a model by itself; None where nobody has, and where nothing is chosen by it.

    Raises:
        ValueError: see :func:`score_model`; or the command would score another checkpoint of the run folder.
    """
    folder = checkpoint.path.parent
    if settings.score.command is not None:
        newest = find_checkpoint(RunFolder(folder))
        if newest != checkpoint.path:
            raise ValueError(
                f"{checkpoint.source}: --score-command is given the run folder, whose newest checkpoint is {newest}. "
                "Copy the one that you mean into a run folder of its own."
            )
    try:
        return score_model(folder, checkpoint.path, settings.score)
    except ValueError as error:
        if settings.method != "average" or settings.score.command is not None:
            raise
        LOGGER.warning("no score: %s", error)  # the mean of all is the same without
        return None


def _choose(
    candidates: Sequence[Candidate], score: Callable[[tuple[int, ...]], float], settings: SoupSettings
) -> Choice:
    """Choose the members, and score what was chosen if that can be done."""
    lower = settings.score.lower_is_better
    if settings.method == "greedy":
        return choose_greedily(candidates, score, lower_is_better=lower)
    if settings.method == "maximum":
        assert settings.top is not None
        choice = choose_maximum(candidates, settings.top, lower_is_better=lower)
    else:
        choice = Choice(tuple(range(len(candidates))), None)
    if settings.score.command is None:
        return choice
    return Choice(choice.members, score(choice.members))


def _write(folder: Path, members: Sequence[OwnCheckpoint], given: Sequence[float] | None, named: Path) -> Path:
    """Write the mean into a run folder that will be called ``named``. Returns its checkpoint."""
    first = members[0]
    mean = Mean(members, given or shares(None, len(members)))
    with progress_bar() as progress:
        task = progress.add_task(f"mixing {len(members)} models", total=len(first.tensors))

        def read(key: str) -> Tensor:
            progress.advance(task)
            return mean.read(key)

        files: dict[str, bytes | Path] = {**first.small_files, **first.description_in(named)}
        files.pop(CARRIED_NAME, None)  # weights of the first alone, of no use to the model
        return write_release(RunFolder(folder), first.tensors, read, files)


def _report(folder: Path, soup: Soup, settings: SoupSettings) -> None:
    """Write what went in and how it scored, as JSON and as a table."""
    choice, names = soup.choice, [one.name for one in soup.candidates]
    share_of = dict(zip(choice.members, soup.shares, strict=True))
    tree = {
        "method": settings.method,
        "score_command": settings.score.command,
        "score_file": settings.score.file,
        "lower_is_better": settings.score.lower_is_better,
        "models": [
            {"name": one.name, "score": one.score, "share": share_of.get(place, 0.0)}
            for place, one in enumerate(soup.candidates)
        ],
        "order": [names[place] for place in choice.members],
        "soup": {"score": choice.score},
        "trials": [asdict(trial) for trial in choice.trials],
    }
    (folder / REPORT_NAME).write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [(name, _number(score), f"{share:.3f}") for name, score, share in table_rows(soup)]
    lines = [f"# Soup: {settings.method}", "", "| model | score | share |", "|---|---:|---:|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    if choice.trials:
        lines += ["", "| tried, in this order | score | kept |", "|---|---:|---|"]
        lines += [
            f"| {' + '.join(trial.members)} | {_number(trial.score)} | {'yes' if trial.kept else 'no'} |"
            for trial in choice.trials
        ]
    (folder / TABLE_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    LOGGER.info("soup of %d of %d models: %s", len(choice.members), len(names), soup.checkpoint)


def table_rows(soup: Soup) -> list[tuple[str, float | None, float]]:
    """Name, score and share of each model, and at the end of the soup."""
    share_of = dict(zip(soup.choice.members, soup.shares, strict=True))
    rows = [(one.name, one.score, share_of.get(place, 0.0)) for place, one in enumerate(soup.candidates)]
    return [*rows, ("soup", soup.choice.score, sum(soup.shares))]


def _number(score: float | None) -> str:
    return "not measured" if score is None else f"{score:.6g}"
