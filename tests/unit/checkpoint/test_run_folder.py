"""The run folder, with checkpoints that hold a file each."""

from pathlib import Path

import pytest

from megavlm.checkpoint.folder import RELEASE, Iteration, RunFolder, iteration_of
from megavlm.checkpoint.manifest import MANIFEST_NAME, write_manifest


def add(run_folder: RunFolder, *iterations: Iteration) -> None:
    for iteration in iterations:
        written = run_folder.start_writing(iteration)
        fill(written, str(iteration))
        run_folder.publish(written, iteration)


def fill(folder: Path, text: str) -> None:
    (folder / "data").write_text(text)
    write_manifest(folder)


def names(run_folder: RunFolder) -> list[str]:
    return sorted(path.name for path in run_folder.path.iterdir())


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_folder_that_is_not_there_is_empty(run_folder: RunFolder) -> None:
    assert run_folder.checkpoints() == []
    assert run_folder.newest() is None
    assert run_folder.read_tracker() is None
    assert run_folder.clean() == []


def test_steps_are_listed_in_order_of_their_numbers(run_folder: RunFolder) -> None:
    add(run_folder, 12345678, 20, 3, RELEASE)  # as text, iter_12345678 comes before iter_0000003
    for name in ("iter_3", "iter_00000a1", "iter_0000003.old", "xiter_0000004"):
        (run_folder.path / name).mkdir()
    assert run_folder.checkpoints() == [RELEASE, 3, 20, 12345678]
    assert run_folder.newest() == 12345678
    assert run_folder.read_tracker() == RELEASE  # the last one saved


def test_release_is_newest_only_where_there_is_nothing_else(run_folder: RunFolder) -> None:
    add(run_folder, RELEASE)
    assert run_folder.newest() == RELEASE
    add(run_folder, 1)
    assert run_folder.newest() == 1


@pytest.mark.parametrize("damage", ["manifest", "file", "size"])
def test_a_damaged_checkpoint_is_present_but_not_complete(run_folder: RunFolder, damage: str) -> None:
    add(run_folder, 1, 2)
    checkpoint = run_folder.checkpoint(2)
    if damage == "manifest":
        (checkpoint / MANIFEST_NAME).unlink()
    elif damage == "file":
        (checkpoint / "data").unlink()
    else:
        (checkpoint / "data").write_text("")
    assert run_folder.newest() == 2
    assert run_folder.complete() == [1]


def test_unreadable_tracker_is_named(run_folder: RunFolder) -> None:
    add(run_folder, 1)
    (run_folder.path / "latest_checkpointed_iteration.txt").write_text("one")
    with pytest.raises(ValueError, match=r"latest_checkpointed_iteration.txt: holds 'one', not a step"):
        run_folder.read_tracker()


def test_publishing_again_replaces(run_folder: RunFolder) -> None:
    add(run_folder, 1)
    written = run_folder.start_writing(1)
    fill(written, "again")
    run_folder.publish(written, 1)
    assert (run_folder.checkpoint(1) / "data").read_text() == "again"
    assert names(run_folder) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize(
    ("keep_last", "keep", "left"), [(1, None, [4]), (2, None, [3, 4]), (9, None, [1, 3, 4]), (1, 3, [3, 4])]
)
def test_prune_keeps_the_newest_complete_ones(
    run_folder: RunFolder, keep_last: int, keep: int | None, left: list[int]
) -> None:
    add(run_folder, RELEASE, 1, 2, 3, 4)
    (run_folder.checkpoint(2) / MANIFEST_NAME).unlink()  # somebody may still want to look at it
    run_folder.prune(keep_last, keep=keep)
    assert run_folder.complete() == [RELEASE, *left]
    assert 2 in run_folder.checkpoints()


def test_prune_counts_complete_checkpoints_only(run_folder: RunFolder) -> None:
    add(run_folder, 1, 2, 3)
    for step in (2, 3):
        (run_folder.checkpoint(step) / "data").write_text("")
    run_folder.prune(1)
    assert run_folder.complete() == [1]


def test_clean_removes_its_own_leftovers_only(run_folder: RunFolder) -> None:
    add(run_folder, 1)
    others = ["iter_0000002.writing", "iter_0000002.writing-notes", "iter_0000002.deleting-12345678x", "logs"]
    leftovers = ["iter_0000002.writing-0123abcd", "iter_0000001.deleting-0123abcd", "release.writing-00000000"]
    for name in others + leftovers:
        (run_folder.path / name / "part").mkdir(parents=True)
    assert sorted(run_folder.clean()) == sorted(leftovers)
    assert names(run_folder) == sorted(["iter_0000001", "latest_checkpointed_iteration.txt", *others])


def test_clean_names_a_checkpoint_that_was_complete(run_folder: RunFolder) -> None:
    """Killed between the two renames that replace a checkpoint: neither is under its name."""
    add(run_folder, 1)
    fill(run_folder.start_writing(1), "new")
    run_folder.checkpoint(1).rename(run_folder.path / "iter_0000001.deleting-0123abcd")
    run_folder.clean()
    assert (run_folder.checkpoint(1) / "data").read_text() == "new"
    assert names(run_folder) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def test_clean_does_not_replace_a_checkpoint(run_folder: RunFolder) -> None:
    add(run_folder, 1)
    fill(run_folder.start_writing(1), "new")
    run_folder.clean()
    assert (run_folder.checkpoint(1) / "data").read_text() == "1"
    assert names(run_folder) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize(("name", "step"), [("iter_0000100", 100), ("release", 0), ("best", 0)])
def test_iteration_of(name: str, step: int) -> None:
    assert iteration_of(Path("/run") / name) == step
