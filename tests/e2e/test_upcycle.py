"""``megavlm upcycle``: a trained dense run becomes a mixture of experts, which trains on."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from command_line import assert_one_error, losses

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_a_run_is_upcycled_and_trains_on(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    result = megavlm("train", recipe, "training.train_iters=4")
    assert result.returncode == 0, result.stdout

    options = ("--num-experts", 4, "--every", 2, "--first", 1)
    result = megavlm("upcycle", "run", "moe", *options, "model.language.moe.moe_aux_loss_coeff=0.02")
    assert result.returncode == 0, result.stdout
    assert "4 experts, top 2, in 1 of 2 layers (1); second matrices times 1" in result.stdout
    assert "equal to the dense model at the start" in result.stdout
    assert "image of 2 tiles: logits differ by at most" in result.stdout

    # a fresh optimizer: another run starts from the weights, with a recipe of its own
    start = ("checkpoint.pretrained_checkpoint=moe", f"checkpoint.save={tmp_path / 'next'}", "training.train_iters=1")
    model = ("model.language.moe.num_moe_experts=4", "model.language.moe.moe_layer_freq=[0,1]")
    two_ranks = ("--nproc-per-node", 2, "engine.expert_model_parallel_size=2")
    result = megavlm("train", recipe, *start, *model, *two_ranks, "training.optimizer.lr_warmup_iters=0")
    assert result.returncode == 0, result.stdout
    assert losses(tmp_path / "next")[0][1] < losses(tmp_path / "run")[1][1]  # begins where the dense one ended

    # a carried one: the same run goes on
    shards = ("--granularity", 2, "--top-k", 3)
    result = megavlm("upcycle", "run", "carried", *options, *shards, "--optimizer", "carried", "--no-probe")
    assert result.returncode == 0, result.stdout
    assert "not equal to the dense model: --top-k=3 is no multiple of --granularity=2" in result.stdout
    assert "differences were not measured" in result.stdout
    result = megavlm("train", "carried/recipe.yaml", "training.train_iters=6")
    assert result.returncode == 0, result.stdout
    assert "after step 4" in result.stdout
    assert [step for step, *_ in losses(tmp_path / "carried")] == [5, 6]

    again = megavlm("upcycle", "run", "moe", *options)
    assert_one_error(again, "megavlm upcycle: error: target=moe: exists already")
    both = megavlm("upcycle", "run", "more", *options, "--layers", "0,1")
    assert_one_error(both, "--layers=0,1: says it all. Leave --every and --first out.")
