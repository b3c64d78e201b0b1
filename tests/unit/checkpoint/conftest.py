"""One real checkpoint of a small model, saved once, and a copy of it for each test."""

import shutil
from pathlib import Path

import checkpoint_model
import pytest
from harness import run_ranks

from megavlm.checkpoint import save_checkpoint

FILES = {"recipe.yaml": "a: 1\n", "tokenizer/vocab.bin": b"\x00\x01"}


def save_some(folder: Path) -> None:
    engine = checkpoint_model.build(language=checkpoint_model.SMALLEST)
    for step in (1, 2):
        checkpoint_model.train(engine, step, 1)
        save_checkpoint(folder, step, engine, {"consumed_samples": 4 * step}, FILES)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(save_some, 1, folder)
    return folder


@pytest.fixture
def run_copy(saved: Path, tmp_path: Path) -> Path:
    """A run folder with steps 1 and 2."""
    return Path(shutil.copytree(saved, tmp_path / "run"))
