"""Times how fast a recipe's data are read: samples a second with 0, 1 and more workers, without any model.

    python tools/data_benchmark.py examples/quickstart/stage2.yaml
    python tools/data_benchmark.py examples/data/blend.yaml --workers 0 2

A sample is read, its images are decoded and tiled, its text is made tokens, and it is put into a batch, packed if the
recipe packs. Settings take turns, so that a machine that gets slower slows all. What a training run waits for its data
stands in its own log (``data wait``). The table goes to docs/BENCHMARKS.md.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megavlm.batch import Batch
from megavlm.build import build_processor
from megavlm.config import load_recipe
from megavlm.data import Loader, PackedLoader
from megavlm.recipe import Recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Time a recipe's data and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn, after one to warm up")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each number of workers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, options.overrides, Recipe)
    rounds: dict[int, list[tuple[int, int, int, float]]] = {number: [] for number in options.workers}
    for _ in range(options.rounds):
        for number in options.workers:
            rounds[number].append(time_steps(recipe, number, options.steps))
    print(f"{options.recipe}: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| workers | samples/s (min to max) | tokens/s | tiles/s |\n| --- | --- | --- | --- |")
    for number, turns in rounds.items():
        samples, tokens, tiles = ([turn[kind] / turn[3] for turn in turns] for kind in range(3))
        print(
            f"| {number} | {statistics.median(samples):.0f} ({min(samples):.0f} to {max(samples):.0f})"
            f" | {statistics.median(tokens):.0f} | {statistics.median(tiles):.0f} |"
        )


def time_steps(recipe: Recipe, num_workers: int, num_steps: int) -> tuple[int, int, int, float]:
    """Samples, tokens and tiles of some steps, and their seconds."""
    settings = {
        "micro_batch_size": recipe.training.micro_batch_size,
        "global_batch_size": recipe.training.global_batch_size,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "seed": recipe.training.seed,
        "shuffle": recipe.data.shuffle,
        "num_workers": num_workers,
    }
    dataset, processor = recipe.data.train.build(), build_processor(recipe)
    loader: Loader | PackedLoader
    if recipe.data.packing is not None:
        loader = PackedLoader(dataset, processor, recipe.data.packing, **settings)
    else:
        loader = Loader(dataset, processor, **settings)
    steps = iter(loader)
    next(steps)
    start = time.perf_counter()
    counts = [count(batch) for step in itertools.islice(steps, num_steps) for batch in step]
    seconds = time.perf_counter() - start
    samples, tokens, tiles = (sum(kind) for kind in zip(*counts, strict=True))
    return samples, tokens, tiles, seconds


def count(batch: Batch) -> tuple[int, int, int]:
    """Samples, tokens that are no padding, and tiles of a batch."""
    return len(batch.keys), int(batch.row_lengths.sum()), len(batch.tiles)


if __name__ == "__main__":
    main()
