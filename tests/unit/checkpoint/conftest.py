"""One real checkpoint of a small model, saved once, and a copy of it for each test."""

import shutil
from pathlib import Path

import pytest
from harness import run_ranks
from saved_run import save_some


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(save_some, 1, folder)
    return folder


@pytest.fixture
def run_copy(saved: Path, tmp_path: Path) -> Path:
    """A run folder with steps 1 and 2."""
    return Path(shutil.copytree(saved, tmp_path / "run"))
