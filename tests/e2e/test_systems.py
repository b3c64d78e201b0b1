"""The systems' small recipes train, and what one makes the next starts from."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import command_environment
from train_systems import EXAMPLES, NAMES

pytestmark = pytest.mark.timeout(400)


def test_no_small_recipe_is_forgotten() -> None:
    found = {f"{path.parent.name}/{path.stem}" for path in EXAMPLES.glob("*/tiny*.yaml")}
    assert set(NAMES) == {name for name in found if name.split("/")[0] not in ("nvlm", "moe")}


def test_the_small_recipes_train(dataset: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("train_systems.py")
    done = subprocess.run(
        [sys.executable, str(script), str(dataset), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=380,
        env=command_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for name in NAMES:
        assert f"trained {name}\n" in done.stdout
    assert (tmp_path / "runs/points_tiny/soup/soup.md").is_file()
