"""Which checkpoint a run goes on from when the newest is damaged; checkpoints that hold a few files each."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import delete, empty, flip_bit, truncate

from megavlm.checkpoint import RunFolder, find_to_resume
from megavlm.checkpoint.folder import RELEASE, Iteration
from megavlm.checkpoint.manifest import MANIFEST_NAME, write_manifest
from megavlm.config import load_recipe
from megavlm.recipe import Recipe
from megavlm.runtime.log import LOGGER, stop_log

TINY = Path(__file__).parents[3] / "examples" / "nvlm" / "tiny.yaml"


def run_with(path: Path, *iterations: Iteration) -> RunFolder:
    folder = RunFolder(path)
    for iteration in iterations:
        written = folder.start_writing(iteration)
        for name in ("tensors", "recipe.yaml"):
            (written / name).write_text(f"{name} of {iteration}")
        write_manifest(written)
        folder.publish(written, iteration)
    return folder


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.path.iterdir())


@pytest.fixture(autouse=True)
def _forget_warnings() -> None:
    stop_log()


@pytest.mark.parametrize("fall_back", [True, False])
def test_an_intact_run_is_left_alone(tmp_path: Path, fall_back: bool) -> None:
    assert find_to_resume(RunFolder(tmp_path / "none"), fall_back=fall_back) is None
    folder = run_with(tmp_path, RELEASE, 5, 10)
    before = names(folder)
    assert find_to_resume(folder, fall_back=fall_back) == tmp_path / "iter_0000010"
    assert names(folder) == before


@pytest.mark.parametrize("damage", [delete, empty, flip_bit, truncate])
@pytest.mark.parametrize("name", ["tensors", "recipe.yaml", MANIFEST_NAME])
def test_a_damaged_newest_one_is_set_aside_on_request_only(
    tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger=LOGGER.name)
    folder = run_with(tmp_path, 5, 10, 15)
    damage(tmp_path / "iter_0000015" / name)
    before = names(folder)
    with pytest.raises(ValueError, match=rf"iter_0000015/{name}: .* iter_0000010 is intact: move iter_0000015 out of"):
        find_to_resume(folder)
    assert names(folder) == before

    assert find_to_resume(folder, fall_back=True) == tmp_path / "iter_0000010"
    [aside] = tmp_path.glob("iter_0000015.damaged-*")
    assert (aside / "tensors").exists() == ((name, damage) != ("tensors", delete)), "nothing is deleted"
    assert (folder.newest(), folder.read_tracker()) == (10, 10)
    assert folder.clean() == []
    [line] = [record.getMessage() for record in caplog.records]
    assert f"iter_0000015/{name}: " in line
    assert line.endswith(f"It is {aside.name} now, and the run goes on from iter_0000010 (checkpoint.fall_back).")
    assert find_to_resume(folder) == tmp_path / "iter_0000010", "no damage is left in its way"


def test_it_passes_over_several(tmp_path: Path) -> None:
    folder = run_with(tmp_path, 5, 10, 15)
    for step in (10, 15):
        flip_bit(folder.checkpoint(step) / "tensors")
    assert find_to_resume(folder, fall_back=True) == tmp_path / "iter_0000005"
    assert [path.name.partition(".")[0] for path in sorted(tmp_path.glob("*.damaged-*"))] == [
        "iter_0000010",
        "iter_0000015",
    ]
    assert folder.checkpoints() == [5]


@pytest.mark.parametrize("others", [(), (5,), (RELEASE,)])
def test_without_an_intact_one_nothing_is_touched(tmp_path: Path, others: tuple[Iteration, ...]) -> None:
    """To begin anew would be worse than to stop; a release is weights, from which a run cannot go on."""
    folder = run_with(tmp_path, *others, 10)
    for step in (5, 10):
        if folder.checkpoint(step).exists():
            truncate(folder.checkpoint(step) / "tensors")
    before = names(folder)
    with pytest.raises(ValueError, match=r"iter_0000010/tensors: has \d+ bytes, and had \d+ when it was saved"):
        find_to_resume(folder, fall_back=True)
    assert names(folder) == before


def test_without_verification_nothing_is_looked_at(tmp_path: Path) -> None:
    folder = run_with(tmp_path, 5, 10)
    truncate(tmp_path / "iter_0000010" / "tensors")
    assert find_to_resume(folder, verify=False, fall_back=True) == tmp_path / "iter_0000010"


def test_falling_back_needs_verification() -> None:
    overrides = ["checkpoint.fall_back=true", "checkpoint.verify=false"]
    with pytest.raises(ValueError, match=r"checkpoint\.fall_back=true: checkpoint\.verify is false, so no damage"):
        load_recipe(TINY, overrides, Recipe)
