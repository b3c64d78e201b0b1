"""What a rank finds out about itself."""

import importlib.metadata
from pathlib import Path

import pytest
import torch
from preflight_recipe import recipe_in

from megavlm.preflight import fact as fact_module
from megavlm.preflight.fact import PACKAGES, Facts, find_facts, input_paths, probe_file
from megavlm.recipe import Recipe


def found(recipe: Recipe, local_rank: int = 0) -> Facts:
    facts = Facts(3, local_rank, "n2")
    find_facts(recipe, facts, "token", lambda check: None)
    return facts


def test_a_healthy_rank(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    begun: list[str] = []
    facts = Facts(3, 1, "n2")
    find_facts(recipe, facts, "token", begun.append)
    assert facts.problems == []
    assert begun == ["versions", "device", "run folder", "data", ""]
    assert facts.versions["torch"] == torch.__version__
    assert set(PACKAGES) <= set(facts.versions)
    assert facts.files == {"tokenizer.path": 15, "data.train.path": 11, "data.valid.path": 11}
    assert probe_file(tmp_path / "run", "token", 3).read_text() == "3"


def test_every_path_of_the_recipe_is_read_and_the_run_folder_is_not(tmp_path: Path) -> None:
    pretrained = f"checkpoint.pretrained_checkpoint=[{tmp_path / 'a'}, {tmp_path / 'b'}]"
    recipe = recipe_in(tmp_path, f"data.train.image_root={tmp_path}", pretrained)
    assert {key for key, _ in input_paths(recipe)} == {
        "tokenizer.path",
        "data.train.path",
        "data.train.image_root",
        "data.valid.path",
        "checkpoint.pretrained_checkpoint[0].path",
        "checkpoint.pretrained_checkpoint[1].path",
    }
    assert found(recipe).problems == [
        (
            "data",
            f"checkpoint.pretrained_checkpoint[0].path={tmp_path / 'a'}: cannot be read (No such file or directory).",
        )
    ]


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = recipe_in(tmp_path, f"checkpoint.save={tmp_path / 'file' / 'run'}")
    assert found(recipe).problems == [
        ("run folder", f"checkpoint.save={tmp_path / 'file/run'}: cannot be written to (Not a directory).")
    ]


def test_one_failed_check_does_not_hide_the_next(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, "checkpoint.save=/proc/run")
    (tmp_path / "train.jsonl").unlink()
    assert [check for check, _ in found(recipe).problems] == ["run folder", "data"]


def test_a_package_that_is_not_there_is_a_version_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError
        return "1"

    monkeypatch.setattr(fact_module.importlib.metadata, "version", version)
    assert found(recipe_in(tmp_path)).versions["transformers"] == "not installed"


def test_a_node_with_too_few_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fact_module, "current_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (check, text), *_ = found(recipe_in(tmp_path), local_rank=1).problems
    assert check == "device"
    assert text.startswith("this node shows 1 GPU(s), and local rank 1 needs one more.")


def test_the_digest_changes_with_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "megavlm"
    package.mkdir()
    monkeypatch.setattr(fact_module.megavlm, "__file__", str(package / "__init__.py"))
    digests = set()
    for text in ("a = 1", "a = 2"):
        (package / "__init__.py").write_text(text)
        digests.add(fact_module.source_digest())
    (package / "other.py").write_text("a = 2")
    digests.add(fact_module.source_digest())
    assert len(digests) == 3
