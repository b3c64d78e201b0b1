"""A comparison of two variants of the tiny example, and folders as its runs would leave them."""

import json
from pathlib import Path

import yaml

from megavlm.benchmark.comparison import Chain, Comparison, load_comparison, plan_chains
from megavlm.benchmark.job import round_file
from megavlm.benchmark.speed import Speed, write_speed
from megavlm.config import save_recipe

TINY = Path(__file__).parents[3] / "examples/nvlm/tiny.yaml"


def write_comparison(folder: Path, **changes: object) -> Path:
    """Write a comparison's file and its two stages into a folder."""
    for name in ("first", "second"):
        (folder / f"{name}.yaml").write_text(f"base: {TINY}\ncheckpoint: {{save: unused}}\n", encoding="utf-8")
    content: dict[str, object] = {
        "stages": ["first.yaml", "second.yaml"],
        "overrides": ["training.train_iters=6"],
        "variants": {"tags": [], "none": ["data.tile_tags=none"]},
        "seeds": [1, 2],
        "save": str(folder / "runs"),
        "speed": {"rounds": 2, "steps": 3, "warmup_steps": 1},
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False), encoding="utf-8")
    return path


def plan(path: Path, *overrides: str) -> tuple[Comparison, list[Chain]]:
    """Read a comparison and resolve its recipes for one rank."""
    comparison, for_recipes = load_comparison(path, overrides)
    return comparison, plan_chains(comparison, for_recipes, num_ranks=1)


def leave_checkpoint(chain: Chain, stage: int, iteration: int) -> None:
    """What a stage leaves at a step, as far as a comparison looks at it."""
    planned = chain.stages[stage]
    checkpoint = planned.folder / f"iter_{iteration:07d}"
    checkpoint.mkdir(parents=True)
    save_recipe(planned.recipe, checkpoint / "recipe.yaml")
    points = [{"iteration": step, "lm loss": 4.0 / step, "trained tokens": 9} for step in range(1, iteration + 1)]
    lines = [*map(json.dumps, points), json.dumps({"iteration": iteration, "lm loss validation": 0.25 * chain.seed})]
    (planned.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def leave_evaluation(chain: Chain, exact_match: float) -> None:
    """What ``megavlm eval`` leaves."""
    score = {
        "exact_match": exact_match,
        "blank_images": 0.125,
        "most_frequent_answer": 0.25,
        "num_questions": 8,
        "num_unusable": 0,
        "by_num_tiles": {"1": [0.5, 2], "3": [1.0, 6]},
    }
    (chain.last.folder / "evaluation.json").write_text(json.dumps({"score": score, "answers": []}), encoding="utf-8")


def leave_scores(chain: Chain, **exact_match: float) -> None:
    """What a comparison and ``megavlm eval`` leave of its ``scores``."""
    for score in chain.scores:
        if score.name in exact_match:
            score.folder.mkdir(parents=True)
            save_recipe(score.dataset, score.file)
            content = {"score": {"exact_match": exact_match[score.name]}, "answers": []}
            (score.folder / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")


def finish(chain: Chain, exact_match: float, **scores: float) -> None:
    """A chain that is trained and evaluated."""
    for stage in range(len(chain.stages)):
        leave_checkpoint(chain, stage, chain.stages[stage].recipe.training.train_iters)
    leave_evaluation(chain, exact_match)
    leave_scores(chain, **scores)


def measurement(chain: Chain, samples_per_second: float) -> Speed:
    """A measurement of three steps."""
    return Speed(
        step_seconds=[0.5, 0.25, 1.0],
        data_wait_seconds=0.01,
        samples_per_second=samples_per_second,
        tokens_per_second=100.0 * samples_per_second,
        tiles_per_second=3.0 * samples_per_second,
        flops_per_sample=2.5e9,
        flops_per_second=2.5e9 * samples_per_second,
        peak_memory_bytes=600 * 2**20,
        memory_before_model_bytes=300 * 2**20,
        warmup_steps=1,
        num_ranks=1,
        recipe=chain.last.recipe.model_dump(mode="json"),
    )


def leave_round(comparison: Comparison, chains: list[Chain], number: int, samples_per_second: list[float]) -> None:
    """A complete round of the first seed's chains."""
    timed = [chain for chain in chains if chain.seed == comparison.seeds[0]]
    for chain, rate in zip(timed, samples_per_second, strict=True):
        write_speed(measurement(chain, rate), round_file(comparison, number, chain.variant))
