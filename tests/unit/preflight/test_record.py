"""The record of a run: enough to replay it, nothing secret."""

import shutil
import subprocess
from pathlib import Path

import pytest
from preflight_recipe import recipe_in

import megavlm
from megavlm.config import load_recipe
from megavlm.preflight.record import record_folder, shell_variables, write_record
from megavlm.recipe import Recipe


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", *names, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=True
    ).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of the package with one committed file that was changed since, and one that git does not know."""
    package = tmp_path / "checkout" / "megavlm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("A = 1\n")
    git(package.parent, "init", "--quiet")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "--quiet", "-m", "first")
    (package / "__init__.py").write_text("A = 2\n")
    (package / "new.py").write_text("")
    monkeypatch.setattr(megavlm, "__file__", str(package / "__init__.py"))
    return package.parent


def test_code_and_recipe_can_be_put_back(checkout: Path, tmp_path: Path) -> None:
    recipe, folder = recipe_in(tmp_path), tmp_path / "record"
    write_record(recipe, ["train", "a b.yaml"], {}, folder)
    assert load_recipe(folder / "recipe.yaml", [], Recipe) == recipe
    code = (folder / "code.txt").read_text()
    commit = next(line.removeprefix("commit: ") for line in code.splitlines() if line.startswith("commit: "))
    assert "megavlm/__init__.py" in code
    assert "megavlm/new.py" in code
    again = tmp_path / "again"
    git(tmp_path, "clone", "--quiet", str(checkout), str(again))
    git(again, "checkout", "--quiet", commit)
    assert (again / "megavlm/__init__.py").read_text() == "A = 1\n"
    git(again, "apply", str(folder / "code.patch"))
    assert (again / "megavlm/__init__.py").read_text() == "A = 2\n"
    assert (folder / "command.txt").read_text().endswith("megavlm train 'a b.yaml'\n")
    assert "torch==" in (folder / "packages.txt").read_text()


def test_without_git_the_source_is_still_told_apart(checkout: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkout / ".git")
    texts = []
    for number in range(2):
        (checkout / "megavlm/__init__.py").write_text(f"A = {number}\n")
        write_record(recipe_in(tmp_path), [], {}, tmp_path / str(number))
        texts.append((tmp_path / str(number) / "code.txt").read_text())
    assert "commit: unknown" in texts[0]
    assert texts[0] != texts[1]


def test_the_environment_is_kept_without_secrets(tmp_path: Path) -> None:
    environment = {
        "SLURM_JOB_ID": "7",
        "NCCL_DEBUG": "it's on",
        "HF_HOME": "/cache",
        "HF_TOKEN": "secret1",
        "SLURM_JWT_KEY": "secret2",
        "AWS_SECRET_ACCESS_KEY": "secret3",
        "MY_DIARY": "secret4",
    }
    write_record(recipe_in(tmp_path), [], environment, tmp_path / "record")
    text = (tmp_path / "record/environment.txt").read_text()
    assert text.splitlines() == ["HF_HOME=/cache", "NCCL_DEBUG='it'\"'\"'s on'", "SLURM_JOB_ID=7"]


def test_each_attempt_of_a_job_has_its_folder(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    first = record_folder(recipe, {"SLURM_JOB_ID": "12"})
    third = record_folder(recipe, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"})
    assert (first, third) == (tmp_path / "run/jobs/12/attempt_0", tmp_path / "run/jobs/12/attempt_2")
    assert record_folder(recipe, {}).name == "attempt_0"


def test_a_shell_reads_the_variables_as_they_are_meant(tmp_path: Path) -> None:
    folder = tmp_path / "it's a $(folder)"
    folder.mkdir()
    recipe = recipe_in(folder, "training.train_iters=77")
    script = shell_variables(recipe, folder / "record") + 'printf "%s|" "$RUN_FOLDER" "$TRAIN_ITERS" "$RECORD"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == f"{folder}/run|77|{folder}/record|"


def test_a_record_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/record: the record cannot be written there \(Not a directory\)"):
        write_record(recipe_in(tmp_path), [], {}, tmp_path / "file/record")
