"""Runs a comparison: trains, evaluates and times its variants one after the other, and keeps one table of them."""

import os
import shutil
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from megavlm.benchmark.child import RunError, run_command
from megavlm.benchmark.comparison import Chain, Comparison, check_inputs, load_comparison, plan_chains
from megavlm.benchmark.job import Job, plan_jobs, steps_done
from megavlm.benchmark.picture import draw_comparison
from megavlm.benchmark.results import Results, collect_results, print_results, write_results
from megavlm.config import save_recipe


def compare(path: Path, overrides: Sequence[str], *, num_ranks: int, is_quiet: bool) -> Results:
    """Run what is left of a comparison. Everything that can be checked is checked before the first run.

    Writes ``comparison.yaml``, ``results.json``, ``results.md`` and ``compare.png`` into the comparison's ``save``,
    anew after every run.

    Args:
        path: the comparison's file.
        overrides: ``key=value``, see :func:`megavlm.benchmark.comparison.load_comparison`.
        num_ranks: of every run, on this machine.
        is_quiet: whether the runs' output goes to ``output.txt`` in their folders.

    Raises:
        ValueError: the file, an override, a recipe or its data is wrong; or a folder holds something else.
        RunError: a run did not come to its end. The same call goes on with it.
    """
    if "RANK" in os.environ:
        raise ValueError(
            f"RANK={os.environ['RANK']}: a comparison starts the ranks of its runs itself. Call it once, outside "
            "torchrun, with --nproc-per-node."
        )
    comparison, for_recipes = load_comparison(path, overrides)
    chains = plan_chains(comparison, for_recipes, num_ranks)
    jobs = plan_jobs(comparison, chains, num_ranks)
    if jobs:
        check_inputs(chains)
    _make_folder(comparison.save)
    save_recipe(comparison, comparison.save / "comparison.yaml")
    console = Console()
    start = time.monotonic()
    for number, job in enumerate(jobs, start=1):
        passed = timedelta(seconds=round(time.monotonic() - start))
        console.rule(f"run {number} of {len(jobs)} | {job.name} | {passed} so far")
        _run(job, is_quiet=is_quiet)
        _update(comparison, chains)
    if not jobs:
        console.print("Everything is done already.")
    results = _update(comparison, chains)
    print_results(results)
    console.print(f"results: {comparison.save}/results.json, results.md, compare.png", soft_wrap=True)
    return results


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"save={path}: cannot be made ({error.strerror}). Choose another folder.") from None


def _run(job: Job, *, is_quiet: bool) -> None:
    for path in job.clears:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    job.stage.folder.parent.mkdir(parents=True, exist_ok=True)
    save_recipe(job.stage.recipe, job.stage.file)
    if job.score is not None:
        job.score.file.parent.mkdir(parents=True, exist_ok=True)
        save_recipe(job.score.dataset, job.score.file)
    run_command(job.name, job.arguments, job.output if is_quiet else None)
    if job.kind != "train":
        return
    done, wanted = steps_done(job.stage), job.stage.recipe.training.train_iters
    if done < wanted:  # training.exit_duration_in_mins, or somebody asked the child to stop
        raise RunError(f"{job.name}: stopped after step {done} of {wanted}. The same command goes on with it.", 1)


def _update(comparison: Comparison, chains: Sequence[Chain]) -> Results:
    """Write results and picture as they are now."""
    results = collect_results(comparison, chains)
    write_results(comparison.save, results)
    draw_comparison(comparison.save / "compare.png", chains, results)
    return results
