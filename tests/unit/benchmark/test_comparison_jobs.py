"""What is left to do of a comparison: finished runs are not repeated, other runs are not taken for its own."""

from pathlib import Path

import pytest
from made_up import (
    finish,
    leave_checkpoint,
    leave_evaluation,
    leave_round,
    leave_scores,
    measurement,
    plan,
    write_comparison,
)

from megavlm.benchmark.comparison import Chain, Comparison
from megavlm.benchmark.job import Job, first_difference, is_evaluated, plan_jobs, round_file, steps_done
from megavlm.benchmark.speed import write_speed
from megavlm.config import load_recipe
from megavlm.recipe import Recipe

ALL_OF_A_CHAIN = ["train first", "train second", "evaluate second"]


def jobs(comparison: Comparison, chains: list[Chain], num_ranks: int = 1) -> list[Job]:
    return plan_jobs(comparison, chains, num_ranks)


def names(planned: list[Job], variant: str, seed: int) -> list[str]:
    start = f"{variant}, seed {seed}: "
    return [job.name.removeprefix(start) for job in planned if job.name.startswith(start)]


def test_everything_is_left_of_an_empty_folder(tmp_path: Path) -> None:
    comparison, chains = plan(write_comparison(tmp_path))
    planned = jobs(comparison, chains, num_ranks=2)
    assert len(planned) == 4 * 3 + 2 * 2
    assert names(planned, "none", 2) == ALL_OF_A_CHAIN
    folder = tmp_path / "runs/none/seed1"
    train = next(job for job in planned if job.name == "none, seed 1: train second")
    assert train.arguments == ("train", str(folder / "second.yaml"), "--nproc-per-node", "2")
    evaluate = next(job for job in planned if job.name == "none, seed 1: evaluate second")
    assert evaluate.arguments == ("eval", str(folder / "second"), "--nproc-per-node", "2")


def test_variants_take_turns_and_the_first_changes(tmp_path: Path) -> None:
    comparison, chains = plan(write_comparison(tmp_path), "train=false")
    planned = jobs(comparison, chains)
    assert [job.name.split(":")[0] for job in planned] == ["tags", "none", "none", "tags"]
    assert planned[0].arguments[:2] == ("bench", "speed")
    assert planned[0].arguments[3:7] == ("--steps", "3", "--warmup-steps", "1")


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    comparison, chains = plan(write_comparison(tmp_path, speed=None))
    tags1, none1, tags2, none2 = chains
    finish(tags1, 0.5)
    leave_checkpoint(none1, 0, 6)  # second stage not begun
    leave_checkpoint(tags2, 0, 6)
    leave_checkpoint(tags2, 1, 4)  # half of the second stage
    leave_checkpoint(none2, 0, 6)
    leave_checkpoint(none2, 1, 6)  # not evaluated
    planned = jobs(comparison, chains)
    assert names(planned, "tags", 1) == []
    assert names(planned, "none", 1) == ["train second", "evaluate second"]
    assert names(planned, "tags", 2) == ["train second", "evaluate second"]
    assert names(planned, "none", 2) == ["evaluate second"]
    assert steps_done(tags2.last) == 4


def test_the_evaluation_of_a_half_trained_model_does_not_count(tmp_path: Path) -> None:
    comparison, chains = plan(write_comparison(tmp_path, speed=None))
    leave_checkpoint(chains[0], 0, 6)
    leave_checkpoint(chains[0], 1, 4)
    leave_evaluation(chains[0], 0.1)
    train, evaluate = jobs(comparison, chains)[:2]
    assert (train.kind, evaluate.kind) == ("train", "eval")
    assert train.clears == tuple(chains[0].last.folder / name for name in ("evaluation.json", "scores"))


SCORES = {name: {"kind": "jsonl", "path": f"{name}.jsonl"} for name in ("text", "shots")}


def test_scores_are_evaluations_of_their_own(tmp_path: Path) -> None:
    comparison, chains = plan(write_comparison(tmp_path, scores=SCORES, speed=None, seeds=[1]))
    finish(chains[0], 0.5, text=0.25)
    planned = jobs(comparison, chains)
    assert names(planned, "tags", 1) == ["evaluate second on shots"]
    every = [f"evaluate second{on}" for on in ("", " on text", " on shots")]
    assert names(planned, "none", 1) == ["train first", "train second", *every]
    folder = tmp_path / "runs/tags/seed1/second"
    verb, run, data, option, output, *_ = planned[0].arguments
    assert (verb, run, option, output) == ("eval", str(folder), "--output", str(folder / "scores/shots"))
    assert (
        load_recipe(folder.parent / "second/iter_0000006/recipe.yaml", [data], Recipe).data.valid
        == (comparison.scores["shots"])
    )
    assert planned[0].clears == (folder / "scores/shots",)
    assert not is_evaluated(chains[0])
    leave_scores(chains[0], shots=0.0)
    assert is_evaluated(chains[0])


def test_a_score_on_other_data_is_refused(tmp_path: Path) -> None:
    finish(plan(write_comparison(tmp_path, scores=SCORES))[1][0], 0.5, text=0.25, shots=0.0)
    comparison, chains = plan(write_comparison(tmp_path, scores=SCORES), "scores.text.limit=7")
    message = r"seed1/second/scores/text was made with other settings: text\.limit was None and is 7 now"
    with pytest.raises(ValueError, match=message):
        jobs(comparison, chains)


def test_a_run_of_another_recipe_is_refused(tmp_path: Path) -> None:
    path = write_comparison(tmp_path, speed=None)
    finish(plan(path)[1][1], 0.5)
    comparison, chains = plan(path, "training.optimizer.lr=0.5")
    message = r"save: .*/none/seed1/first was made with other settings: training\.optimizer\.lr was 0\.001 and is 0\.5"
    with pytest.raises(ValueError, match=message):
        jobs(comparison, chains)


def test_a_round_counts_when_every_variant_is_in_it(tmp_path: Path) -> None:
    comparison, chains = plan(write_comparison(tmp_path, train=False))
    leave_round(comparison, chains, 1, [10.0, 8.0])
    write_speed(measurement(chains[0], 10.0), round_file(comparison, 2, "tags"))
    planned = jobs(comparison, chains)
    assert [job.name for job in planned] == ["none: time second, round 2 of 2", "tags: time second, round 2 of 2"]
    # the half round goes before the first of its variants is timed, and never between them
    assert [job.clears for job in planned] == [(round_file(comparison, 2, "tags").parent,), ()]


@pytest.mark.parametrize(
    ("override", "num_ranks", "message"),
    [
        ("speed.steps=4", 1, r"round1/tags\.json was made with other settings: speed\.steps was 3 and is 4 now"),
        ("data.seq_length=99", 1, r"recipe\.data\.seq_length was 256 and is 99 now"),
        ("speed.rounds=2", 2, "--nproc-per-node was 1 and is 2 now"),
    ],
)
def test_a_measurement_of_something_else_is_refused(
    tmp_path: Path, override: str, num_ranks: int, message: str
) -> None:
    path = write_comparison(tmp_path, train=False)
    leave_round(*plan(path), 1, [10.0, 8.0])
    comparison, chains = plan(path, override)
    with pytest.raises(ValueError, match=message):
        jobs(comparison, chains, num_ranks)


@pytest.mark.parametrize(
    ("before", "now", "difference"),
    [
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 2]}}, None),
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [2, 1]}}, ("b.c", [1, 2], [2, 1])),
        ({"b": {"c": 1}}, {"b": None}, ("b", {"c": 1}, None)),
    ],
)
def test_first_difference(before: object, now: object, difference: object) -> None:
    assert first_difference(before, now) == difference


@pytest.mark.parametrize(
    ("before", "now", "key"), [({"a": 1, "b": 2}, {"a": 1}, "b"), ({"a": 1}, {"a": 1, "b": None}, "b")]
)
def test_a_key_that_only_one_has_is_a_difference(before: object, now: object, key: str) -> None:
    found = first_difference(before, now)
    assert found is not None
    assert found[0] == key
