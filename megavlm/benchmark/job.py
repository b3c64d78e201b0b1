"""What is left to do of a comparison, read from its folders: what is finished is not run again, and what was made with
another recipe is not taken for this one's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from megavlm.benchmark.comparison import SCORES_FOLDER, Chain, Comparison, PlannedScore, PlannedStage
from megavlm.benchmark.speed import read_speed
from megavlm.checkpoint import RunFolder
from megavlm.config import load_recipe
from megavlm.recipe import Recipe

EVALUATION_FILE = "evaluation.json"
_NOTHING = object()


@dataclass(frozen=True)
class Job:
    """A ``megavlm`` command to run."""

    kind: Literal["train", "eval", "speed"]
    name: str
    arguments: tuple[str, ...]
    """Of the command."""
    output: Path
    """Where its output goes if it is not shown."""
    stage: PlannedStage
    clears: tuple[Path, ...] = ()
    """Files and folders of an older try, removed before the command starts."""
    score: PlannedScore | None = None
    """What an evaluation is on, if not on the recipe's own held-out data."""


def plan_jobs(comparison: Comparison, chains: Sequence[Chain], num_ranks: int) -> list[Job]:
    """List the commands that are left: training and evaluation of each chain, then the rounds of timing.

    Raises:
        ValueError: a folder holds a run or a measurement with other settings; names it, the first key that differs and
            both values.
    """
    jobs = []
    if comparison.train:
        for chain in chains:
            jobs += _plan_chain(chain, num_ranks)
    if comparison.speed is not None:
        timed = [chain for chain in chains if chain.seed == comparison.seeds[0]]
        for number in range(1, comparison.speed.rounds + 1):
            jobs += _plan_round(comparison, timed, number, num_ranks)
    return jobs


def steps_done(stage: PlannedStage) -> int:
    """The step of a stage's newest checkpoint; 0 if it has none.

    Raises:
        ValueError: the checkpoint was made with other settings.
    """
    folder = RunFolder(stage.folder)
    newest = folder.newest()
    if not isinstance(newest, int):
        return 0
    saved = load_recipe(folder.checkpoint(newest) / "recipe.yaml", [], Recipe)
    check_same(stage.folder, saved.model_dump(mode="json"), stage.recipe.model_dump(mode="json"))
    return newest


def is_evaluated(chain: Chain) -> bool:
    """Whether the last stage is trained to its end and all its evaluations are there.

    Raises:
        ValueError: one of them was made with other settings.
    """
    if steps_done(chain.last) < chain.last.recipe.training.train_iters:
        return False
    return (chain.last.folder / EVALUATION_FILE).exists() and all(map(_is_scored, chain.scores))


def _is_scored(score: PlannedScore) -> bool:
    if not ((score.folder / EVALUATION_FILE).exists() and score.file.exists()):
        return False
    before = yaml.safe_load(score.file.read_text(encoding="utf-8"))
    check_same(score.folder, {score.name: before}, {score.name: score.dataset.model_dump(mode="json")})
    return True


def round_file(comparison: Comparison, number: int, variant: str) -> Path:
    """Where the measurement of a variant in a round is kept."""
    return comparison.save / "speed" / f"round{number}" / f"{variant}.json"


def first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key whose value differs between two trees, with both values; None if they are equal."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return None if before == now else (key, before, now)
    for name in [*now, *(name for name in before if name not in now)]:
        path = f"{key}.{name}" if key else name
        if found := first_difference(before.get(name, _NOTHING), now.get(name, _NOTHING), path):
            return found
    return None


def check_same(place: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse what was made with other settings.

    Raises:
        ValueError: a value differs; names the place, the first key and both values.
    """
    if difference := first_difference(before, now):
        key, old, new = difference
        raise ValueError(
            f"save: {place} was made with other settings: {key} was {_show(old)} and is {_show(new)} now. Choose "
            "another `save`, or delete what is there."
        )


def _plan_chain(chain: Chain, num_ranks: int) -> list[Job]:
    jobs = []
    name = f"{chain.variant}, seed {chain.seed}"
    for stage in chain.stages:
        if steps_done(stage) < stage.recipe.training.train_iters:
            jobs.append(
                Job(
                    "train",
                    f"{name}: train {stage.name}",
                    ("train", str(stage.file), *_ranks(num_ranks)),
                    stage.folder / "output.txt",
                    stage,
                    # of a half-trained model, if a person made one
                    clears=(stage.folder / EVALUATION_FILE, stage.folder / SCORES_FOLDER),
                )
            )
    return jobs + _plan_evaluations(chain, name, num_ranks, is_trained=not any(job.stage is chain.last for job in jobs))


def _plan_evaluations(chain: Chain, name: str, num_ranks: int, *, is_trained: bool) -> list[Job]:
    last = chain.last
    output = last.folder / "output.txt"
    jobs = []
    if not (is_trained and (last.folder / EVALUATION_FILE).exists()):
        arguments = ("eval", str(last.folder), *_ranks(num_ranks))
        jobs.append(Job("eval", f"{name}: evaluate {last.name}", arguments, output, last))
    for score in chain.scores:
        if not (is_trained and _is_scored(score)):
            on = f"data.valid={json.dumps(score.dataset.model_dump(mode='json'))}"  # JSON is YAML
            arguments = ("eval", str(last.folder), on, "--output", str(score.folder), *_ranks(num_ranks))
            text = f"{name}: evaluate {last.name} on {score.name}"
            jobs.append(Job("eval", text, arguments, output, last, clears=(score.folder,), score=score))
    return jobs


def _plan_round(comparison: Comparison, chains: Sequence[Chain], number: int, num_ranks: int) -> list[Job]:
    """All variants of a round, or none: its ratios are those of neighbours in time."""
    timing = comparison.speed
    assert timing is not None
    files = {chain.variant: round_file(comparison, number, chain.variant) for chain in chains}
    if all(file.exists() for file in files.values()):
        for chain in chains:
            speed = read_speed(files[chain.variant])
            before = {"recipe": speed.recipe, "--nproc-per-node": speed.num_ranks}
            before |= {"speed": {"steps": len(speed.step_seconds), "warmup_steps": speed.warmup_steps}}
            now = {"recipe": chain.last.recipe.model_dump(mode="json"), "--nproc-per-node": num_ranks}
            now |= {"speed": timing.model_dump(include={"steps", "warmup_steps"})}
            check_same(files[chain.variant], before, now)
        return []
    jobs: list[Job] = []
    # who goes first changes, so that no variant always comes after a rest
    for chain in chains if number % 2 else reversed(chains):
        file, stage = files[chain.variant], chain.last
        options = ("--steps", str(timing.steps), "--warmup-steps", str(timing.warmup_steps), "--json", str(file))
        jobs.append(
            Job(
                "speed",
                f"{chain.variant}: time {stage.name}, round {number} of {timing.rounds}",
                ("bench", "speed", str(stage.file), *options, *_ranks(num_ranks)),
                comparison.save / "speed" / "output.txt",
                stage,
                clears=() if jobs else (file.parent,),
            )
        )
    return jobs


def _show(value: Any) -> str:
    return "not given" if value is _NOTHING else repr(value)


def _ranks(num_ranks: int) -> tuple[str, ...]:
    return ("--nproc-per-node", str(num_ranks))
