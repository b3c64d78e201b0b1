"""Runs a sweep: each row in processes of its own, one after the other. Goes on where it was stopped."""

import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megavlm.benchmark.child import RunError, run_process
from megavlm.benchmark.job import check_same
from megavlm.benchmark.speed import read_speed
from megavlm.benchmark.sweep import PlannedRow, Sweep, load_sweep, plan_rows
from megavlm.benchmark.sweep_picture import draw_sweep
from megavlm.benchmark.sweep_row import OK, REFUSED, Row, append_row, explain, read_rows
from megavlm.benchmark.sweep_table import print_sweep, row_summary, write_sweep
from megavlm.build import build_processor
from megavlm.config import load_recipe, save_recipe
from megavlm.planning.memory import count_memory
from megavlm.planning.parameters import recipe_vocab_size
from megavlm.recipe import Recipe


@dataclass(frozen=True)
class Place:
    """Where rows run."""

    num_nodes: int = 1
    """Nodes that there are; rows that need more wait for another call."""
    ranks_per_node: int = 1
    """Where the sweep gives no numbers."""
    launcher: str = ""
    """Command that is called with ``NODES RANKS_PER_NODE -m megavlm ...`` and runs that on so many ranks of Python;
    empty: torchrun on this machine."""


def run_sweep(path: Path, overrides: Sequence[str], place: Place, *, is_again: bool = False) -> list[Row]:
    """Run what is left of a sweep. A row that fails becomes a row with its reason, and the next one begins.

    Writes ``rows.jsonl``, ``rows.md``, ``rows.png`` and a folder for each row into the sweep's ``save``.

    Args:
        path: the sweep's file.
        overrides: ``key=value``, see :func:`megavlm.benchmark.sweep.load_sweep`.
        place: where rows run.
        is_again: run those again that did not end well.

    Returns:
        All rows that ended, in the sweep's order.

    Raises:
        ValueError: the file, an override or the recipe is wrong, or ``save`` holds something else.
        RunError: somebody asked to stop. The same call goes on.
    """
    _check_place(place)
    sweep, for_rows = load_sweep(path, overrides)
    planned = plan_rows(sweep, for_rows, place.ranks_per_node)
    done = read_rows(sweep.save)
    left = [row for row in planned if _is_left(sweep, row, done.get(row.name), is_again)]
    waiting = [row for row in left if row.nodes > place.num_nodes]
    left = [row for row in left if row.nodes <= place.num_nodes]
    _check_inputs(sweep, for_rows)
    _make_folder(sweep.save)
    console = Console()
    for number, row in enumerate(left, start=1):
        console.rule(f"row {number} of {len(left)} | {row.name}")
        result = _run(sweep, row, place)
        append_row(sweep.save, result)
        done[result.name] = result
        console.print(row_summary(result), soft_wrap=True)
        _write(sweep, [done[one.name] for one in planned if one.name in done])
    rows = [done[one.name] for one in planned if one.name in done]
    if not left:
        console.print("Every row is there already.")
        _write(sweep, rows)
    if rows:
        print_sweep(rows)
    if waiting:
        most = max(row.nodes for row in waiting)
        console.print(
            f"{len(waiting)} row(s) wait for more nodes: there are {place.num_nodes}, and they need up to {most}."
        )
    console.print(f"results: {sweep.save}/rows.jsonl, rows.md, rows.png", soft_wrap=True)
    return rows


def _check_place(place: Place) -> None:
    if "RANK" in os.environ:
        raise ValueError(
            f"RANK={os.environ['RANK']}: a sweep starts the ranks of its rows itself. Call it once, outside torchrun "
            "and srun."
        )
    for name, value in (("num-nodes", place.num_nodes), ("nproc-per-node", place.ranks_per_node)):
        if value < 1:
            raise ValueError(f"--{name}={value}: must be at least 1.")
    if place.num_nodes > 1 and not place.launcher:
        raise ValueError(
            f"--num-nodes={place.num_nodes}: without --launcher all ranks run on this machine. Use slurm/bench.sh, or "
            "name a launcher."
        )


def _check_inputs(sweep: Sweep, overrides: Sequence[str]) -> None:
    """Open tokenizer and data once, so that a missing file is told before the first row."""
    recipe = load_recipe(sweep.recipe, [*sweep.overrides, *overrides], Recipe)
    build_processor(recipe)
    recipe.data.train.build()


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"save={path}: cannot be made ({error.strerror}). Choose another folder.") from None


def _is_left(sweep: Sweep, row: PlannedRow, done: Row | None, is_again: bool) -> bool:
    """Whether a row is still to be run.

    Raises:
        ValueError: it was run with other settings.
    """
    if done is None or (is_again and done.status != OK):
        return True
    if row.recipe is None or done.recipe is None:  # a refusal costs nothing: it is looked at anew
        return (row.recipe, row.refusal) != (done.recipe, done.reason)
    before = {"recipe": done.recipe, "steps": done.steps, "warmup_steps": done.warmup_steps, "scaling": done.scaling}
    now = {"recipe": row.recipe.model_dump(mode="json"), "steps": sweep.steps, "warmup_steps": sweep.warmup_steps}
    check_same(sweep.save / row.name, before, now | {"scaling": sweep.scaling})
    return False


def _run(sweep: Sweep, row: PlannedRow, place: Place) -> Row:
    """Run one row to its end, whatever that is."""
    ended = Row(
        name=row.name,
        layout=row.layout,
        settings=row.settings,
        nodes=row.nodes,
        ranks_per_node=row.ranks_per_node,
        steps=sweep.steps,
        warmup_steps=sweep.warmup_steps,
        scaling=sweep.scaling,
        status=REFUSED,
        reason=row.refusal,
    )
    if row.recipe is None:
        return ended
    ended = dataclasses.replace(ended, recipe=row.recipe.model_dump(mode="json"), planned_bytes=_plan(row))
    folder = sweep.save / row.name
    folder.mkdir(parents=True, exist_ok=True)
    output, result = folder / "output.txt", folder / "speed.json"
    for older in (output, result):
        older.unlink(missing_ok=True)
    save_recipe(row.recipe, folder / "recipe.yaml")
    start = time.monotonic()
    try:
        command = _command(sweep, row, place, folder)
        limit_seconds = 60.0 * sweep.time_limit_minutes
        run_process(row.name, command, output, limit_seconds=limit_seconds, has_to_save=False)
        ended = dataclasses.replace(ended, status=OK, speed=read_speed(result))
    except RunError as error:
        if error.is_asked:
            raise
        status, reason = explain(error, output.read_text(encoding="utf-8", errors="replace"))
        ended = dataclasses.replace(ended, status=status, reason=reason)
    return dataclasses.replace(ended, row_seconds=time.monotonic() - start)


def _plan(row: PlannedRow) -> float:
    """Bytes that the rank holds which holds most."""
    assert row.recipe is not None
    return max(rank.total for rank in count_memory(row.recipe, row.ranks, recipe_vocab_size(row.recipe)))


def _command(sweep: Sweep, row: PlannedRow, place: Place, folder: Path) -> list[str]:
    verb = ["-m", "megavlm", "bench", "speed", str(folder / "recipe.yaml"), "--detail"]
    verb += ["--json", str(folder / "speed.json")]
    verb += ["--steps", str(sweep.steps), "--warmup-steps", str(sweep.warmup_steps)]
    if place.launcher:
        return [*shlex.split(place.launcher), str(row.nodes), str(row.ranks_per_node), *verb]
    return [sys.executable, *verb, "--nproc-per-node", str(row.ranks_per_node)]


def _write(sweep: Sweep, rows: Sequence[Row]) -> None:
    write_sweep(sweep.save / "rows.md", rows)
    draw_sweep(sweep.save / "rows.png", rows)
