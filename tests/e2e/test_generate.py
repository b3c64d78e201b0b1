"""``megavlm generate`` as a person runs it, on a hybrid model that was trained a little."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import command, command_environment

from megavlm.cli import main

Run = Callable[..., subprocess.CompletedProcess[str]]
LONG = 200.0
"""Seconds that a command may take on a busy machine, most of them for starting two ranks."""


@pytest.fixture
def trained(megavlm: Run, recipe: Path, tmp_path: Path) -> Path:
    """The run folder of a model."""
    parts = "training.trainable=[vision, connector, cross_attention, language]"
    steps = ["training.train_iters=3", "training.optimizer.lr_warmup_iters=1", "checkpoint.save_interval=null"]
    result = megavlm("train", recipe, "model.fusion.kind=hybrid", "model.fusion.gate_init=1.0", parts, *steps)
    assert result.returncode == 0, result.stdout
    assert "cross_attention" in result.stdout
    return tmp_path / "run"


@pytest.mark.timeout(500)
def test_generate_answers_prompts_files_and_people(megavlm: Run, trained: Path, dataset: Path, tmp_path: Path) -> None:
    image = next(dataset.glob("*.png"))
    few = ("--max-new-tokens", 6)
    asked = megavlm("generate", trained, "--prompt", "what is number 4", "--image", image, *few)
    assert asked.returncode == 0, asked.stdout

    rows = [json.loads(line) for line in (dataset / "valid.jsonl").read_text().splitlines()]
    for row in rows[2:]:
        row["conversations"].pop()  # prompts need no answer
    lines = [json.dumps(row) for row in rows]
    lines.insert(1, "this is no row")
    prompts = dataset / "prompts.jsonl"
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    answers = {}
    for name, options in {
        "pp2": ("--nproc-per-node", 2, "engine.pipeline_model_parallel_size=2"),
        "dp2": ("--nproc-per-node", 2, "--batch-size", 2),
    }.items():
        output = tmp_path / f"{name}.jsonl"
        asked = ("generate", trained, "--jsonl", prompts, "--output", output, *few, *options)
        result = megavlm(*asked, timeout=LONG)
        assert result.returncode == 0, result.stdout
        assert "5 answers" in result.stdout
        assert "1 unusable rows" in result.stdout
        answers[name] = [json.loads(line) for line in output.read_text().splitlines()]
    assert answers["pp2"] == answers["dp2"]
    keys = [answer["key"] for answer in answers["dp2"]]
    assert keys == [f"prompts.jsonl:{number}" for number in range(1, 7)]
    assert "error" in answers["dp2"][1]
    assert answers["dp2"][0]["reference"] == "it is 0"
    assert all(answer["answer"] for number, answer in enumerate(answers["dp2"]) if number != 1)

    typed = f"/image {image}\nwhat is number 7\n/image /not/there.png\nwhat is it\n/nonsense\nand 8\n/exit\n"
    talked = subprocess.run(
        command("generate", trained, *few),
        input=typed,
        capture_output=True,
        text=True,
        timeout=LONG,
        env=command_environment(),
        check=False,
    )
    assert talked.returncode == 0, talked.stderr
    assert "image_missing" in talked.stdout or "not/there.png" in talked.stdout
    assert "/nonsense: is no command" in talked.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "a", "--jsonl", "x", "--output", "y"), "two ways to ask"),
        (("--jsonl", "x"), "belong together"),
        (("--image", "x.png"), "/image PATH"),
        (("--prompt", "a", "--temperature", "-1"), "is below 0"),
        (("--prompt", "a", "--top-p", "0.5"), "temperature=0"),
        (("--prompt", "a", "--top-k", "0", "--temperature", "1"), "leaves no token"),
        (("--prompt", "a", "--max-new-tokens", "0"), "must be at least 1"),
        (("--prompt", "a"), "holds no checkpoint"),
    ],
)
def test_wrong_options_are_one_error(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(tmp_path), *options])
    assert str(caught.value.code).startswith("megavlm generate: error:")
    assert words in str(caught.value.code)
