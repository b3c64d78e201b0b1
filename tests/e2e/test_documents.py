"""Every command that README.md and the examples' READMEs show is run, as far as that is possible in small."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import REPOSITORY, command_environment

DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "examples").rglob("README.md")),
]

# The first begins with downloads of 206 MB; test_real_weights.py runs it on made-up weights. Those of the systems
# build on each other; test_systems.py runs their recipes in order.
SYSTEMS = ("blip2", "flamingo", "llava", "minigpt4", "mm1", "mm1_5", "mplug_owl", "points", "vila", "vpgtrans")
ELSEWHERE = [REPOSITORY / "examples" / name / "README.md" for name in ("real_weights", *SYSTEMS)]

ONE_ROUND = "speed={rounds: 1, steps: 1, warmup_steps: 0}"
# `make train` in small: the same commands with fewer rows and steps.
SMALL = {
    "examples/quickstart/build_data.py": ["--num-stage1", "40", "--num-stage2", "40", "--num-valid", "6"],
    "train": ["training.train_iters=3", "training.optimizer.lr_warmup_iters=1", "training.eval_interval=null"],
    "eval": ["--max-new-tokens", "2"],
    "generate": ["--max-new-tokens", "2"],
    "examples/moe/compare.yaml": ["train=false", ONE_ROUND],
    "examples/moe/compare_speed.yaml": [ONE_ROUND, "training.global_batch_size=4", "training.micro_batch_size=1"],
    "examples/nvlm/compare.yaml": ["train=false", ONE_ROUND],
    "examples/nvlm/compare_speed.yaml": [ONE_ROUND, "training.global_batch_size=2"],
    "examples/nvlm/tile_tags.yaml": ["train=false", ONE_ROUND],
    "examples/nvlm/tile_tags_x.yaml": ["train=false", ONE_ROUND],
}


def commands() -> list[str]:
    """The lines of all bash blocks, comments left out."""
    found = []
    for path in [path for path in DOCUMENTS if path not in ELSEWHERE]:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            found += [line.split(" #")[0].strip() for line in block.splitlines() if line.strip()]
    return sorted(set(found))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a fresh clone, without what Git does not track."""
    folder = tmp_path_factory.mktemp("clone")
    names = ["examples", "tools", "Makefile", "setup.py", "constraints.txt", "requirements.txt", "requirements-dev.txt"]
    for name in names:
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def run(workplace: Path, arguments: list[str]) -> str:
    result = subprocess.run(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=command_environment(),
        cwd=workplace,
        check=False,
    )
    assert result.returncode == 0, f"{arguments}:\n{result.stdout}"
    return result.stdout


def in_this_environment(line: str) -> list[str]:
    """The command with this interpreter in place of the virtual environment's."""
    program, *rest = shlex.split(line)
    if program.endswith("bin/megavlm"):
        return [sys.executable, "-m", "megavlm", *rest]
    assert program.endswith("bin/python"), line
    return [sys.executable, *rest]


def made_small(arguments: list[str]) -> list[str]:
    return [*arguments, *(extra for name, extras in SMALL.items() if name in arguments for extra in extras)]


@pytest.mark.timeout(400)
def test_make_train_in_small(workplace: Path) -> None:
    printed = run(workplace, ["make", "--dry-run", "--assume-old=.venv/installed", "train"])
    lines = printed.replace("\\\n", " ").splitlines()
    steps = [line for line in lines if "bin/" in line and "install.sh" not in line]
    assert len(steps) == 4, printed
    outputs = [run(workplace, made_small(in_this_environment(line))) for line in steps]
    assert "most frequent answer to each question" in outputs[-1]
    stage2 = workplace / "runs/quickstart/stage2"
    for name in ("recipe.yaml", "tensorboard", "loss.png", "samples.png", "evaluation.json", "iter_0000003"):
        assert (stage2 / name).exists(), name


@pytest.mark.timeout(400)
def test_make_moe_in_small(workplace: Path) -> None:
    printed = run(workplace, ["make", "--dry-run", "--assume-old=.venv/installed", "moe", "RUNS=runs/moe_stage1"])
    lines = printed.replace("\\\n", " ").splitlines()
    steps = [line for line in lines if "bin/" in line and "install.sh" not in line]
    assert len(steps) == 6, printed
    outputs = [run(workplace, made_small(in_this_environment(line))) for line in steps]
    assert "equal to the dense model at the start" in outputs[3]
    assert "most frequent answer to each question" in outputs[-1]
    recipe = (workplace / "runs/moe/trained/recipe.yaml").read_text()
    assert "num_moe_experts: 8" in recipe
    assert "expert_model_parallel_size: 2" in recipe


@pytest.mark.timeout(400)
@pytest.mark.parametrize("line", commands())
def test_documented_command(workplace: Path, line: str) -> None:
    if line.startswith("make "):
        targets = shlex.split(line)[1:]
        run(workplace, ["make", "--dry-run", *targets])
        return
    run(workplace, made_small(in_this_environment(line)))


def test_documents_speak_of_files_that_exist() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
