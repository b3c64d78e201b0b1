"""What is wrong with a checkpoint is said in one sentence that names the file or the key and what to do."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoint_model
import pytest
from damage import delete, empty, flip_bit, truncate
from harness import run_ranks
from megatron.core import dist_checkpointing

from megavlm.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from megavlm.checkpoint.manifest import list_files, write_manifest
from megavlm.models.language import LanguageConfig

SMALLEST = checkpoint_model.SMALLEST


DAMAGES = (delete, truncate, empty, flip_bit)


def load_each(folders: list[Path], verify: bool) -> list[str]:
    """Load checkpoints into one engine; return what was said of each."""
    engine = checkpoint_model.build(language=SMALLEST)
    said = []
    for folder in folders:
        try:
            load_checkpoint(folder, engine, with_optimizer=True, verify=verify)
            said.append("loaded")
        except ValueError as error:
            said.append(str(error))
    return said


def damaged_copies(run_folder: Path, folder: Path) -> list[tuple[Path, str, Callable[[Path], None]]]:
    """A copy of the run for each file of its newest checkpoint and each damage."""
    names = [*list_files(run_folder / "iter_0000002"), "manifest.json"]
    copies = []
    for number, (name, damage) in enumerate((name, damage) for name in names for damage in DAMAGES):
        copy = Path(shutil.copytree(run_folder, folder / str(number)))
        damage(copy / "iter_0000002" / name)
        copies.append((copy, name, damage))
    return copies


def test_each_damage_to_each_file_is_named(saved: Path, tmp_path: Path) -> None:
    copies = damaged_copies(saved, tmp_path)
    assert len(copies) == 4 * 10, copies
    for (copy, name, _), said in zip(
        copies, run_ranks(load_each, 1, [copy for copy, _, _ in copies], True)[0], strict=True
    ):
        assert said.startswith(f"{copy}/iter_0000002/{name}: "), said
        assert said.endswith(f"iter_0000001 is intact: move iter_0000002 out of {copy} to go on from it."), said
        assert "\n" not in said


def test_without_verification_damage_is_an_error_or_cannot_be_seen(saved: Path, tmp_path: Path) -> None:
    """Not the promise of a manifest, but neither a crash nor a hang."""
    copies = damaged_copies(saved, tmp_path)
    invisible = ("recipe.yaml", "tokenizer/vocab.bin", "manifest.json")
    for (copy, name, damage), said in zip(
        copies, run_ranks(load_each, 1, [copy for copy, _, _ in copies], False)[0], strict=True
    ):
        if name in invisible:
            assert said == "loaded"
        elif damage is not flip_bit and (name, damage) not in (("extra.json", delete), ("layout.json", delete)):
            assert said != "loaded", name
            assert str(copy) in said, said
            assert "\n" not in said


def test_older_checkpoints_that_are_damaged_too_are_not_recommended(run_copy: Path) -> None:
    for step in (1, 2):
        flip_bit(run_copy / f"iter_000000{step}" / "common.pt")
    said = run_ranks(load_each, 1, [run_copy], True)[0][0]
    assert "common.pt: has changed" in said
    assert said.endswith(f"The 1 older checkpoint(s) in {run_copy} are damaged too.")
    shutil.rmtree(run_copy / "iter_0000001")
    assert run_ranks(load_each, 1, [run_copy], True)[0][0].endswith(f"{run_copy} holds no older one.")


def load_one(
    path: Path,
    language: LanguageConfig = SMALLEST,
    vocab_size: int = checkpoint_model.VOCAB_SIZE,
    trains_only: str = "",
    with_optimizer: bool = False,
    allow_missing: tuple[str, ...] = (),
    allow_unexpected: tuple[str, ...] = (),
) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    engine = checkpoint_model.build(
        language=language, vocab_size=vocab_size, trains=lambda key: trains_only in key, with_optimizer=with_optimizer
    )
    loaded = load_checkpoint(
        path,
        engine,
        with_optimizer=with_optimizer,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )
    return loaded.iteration, loaded.missing, loaded.unexpected


def fails(*args: object, **kwargs: object) -> str:
    """What :func:`load_one` raises."""
    (said,) = run_ranks(_say, 1, args, kwargs)
    return said


def _say(args: tuple, kwargs: dict) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_one(*args, **kwargs)
    return str(caught.value)


def update(**changes: object) -> LanguageConfig:
    return SMALLEST.model_copy(update=changes)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"language": update(ffn_hidden_size=64)},
            r"layers.0.mlp.linear_fc1.weight has shape \(\d+, 32\) in the checkpoint and \(\d+, 32\) in the model",
        ),
        # both are padded to 64
        (
            {"vocab_size": 49},
            r"word_embeddings.weight has shape \(50, 32\) in the checkpoint and \(49, 32\) in the model",
        ),
        (
            {"vocab_size": 99},
            r"word_embeddings.weight has shape \(50, 32\) in the checkpoint and \(99, 32\) in the model",
        ),
        (
            {"language": update(num_layers=2)},
            r"fit the model: 6 keys of the model are not in it \(language.decoder.layers.1.input_layernorm.weight, ",
        ),
        (
            {"language": update(share_embeddings_and_output_weights=True)},
            r"fit the model: 1 of its keys are not in the model \(language.output_layer.weight\). Check the model",
        ),
        (
            {"language": update(add_qkv_bias=True), "allow_missing": ("language.decoder.layers.7",)},
            r"1 keys of the model are not in it \(language.decoder.layers.0.self_attention.linear_qkv.bias\)",
        ),
        (
            {"with_optimizer": True, "trains_only": "mlp"},
            r"\d+ of its keys are not in the model \(optimizer.*Other parts were trained then",
        ),
    ],
)
def test_checkpoint_of_another_model(saved: Path, arguments: dict, expected: str) -> None:
    said = fails(saved, **arguments)
    assert re.search(expected, said), said
    assert said.startswith(f"{saved}/iter_0000002: ")


@pytest.mark.parametrize(
    ("arguments", "missing", "unexpected"),
    [
        ({"language": update(add_qkv_bias=True), "allow_missing": ("language.decoder.",)}, 1, 0),
        ({"language": update(num_layers=2), "allow_missing": ("language.decoder.layers.1.",)}, 6, 0),
        (
            {
                "language": update(share_embeddings_and_output_weights=True),
                "allow_unexpected": ("language.output_layer.",),
            },
            0,
            1,
        ),
    ],
)
def test_allowed_differences_are_returned(saved: Path, arguments: dict, missing: int, unexpected: int) -> None:
    ((iteration, *keys),) = run_ranks(_load, 1, (saved,), arguments)
    assert iteration == 2
    assert [len(part) for part in keys] == [missing, unexpected]


def _load(args: tuple, kwargs: dict) -> tuple:
    return load_one(*args, **kwargs)


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert fails(tmp_path / "empty").startswith(
        f"{tmp_path / 'empty'}: holds no checkpoint (no iter_<step> and no release)"
    )
    assert fails(tmp_path / "none") == f"{tmp_path / 'none'}: is not a folder. Check the path."
    assert find_checkpoint(tmp_path / "none") is None
    assert find_checkpoint(tmp_path / "empty") is None


def test_a_checkpoint_can_be_named(saved: Path) -> None:
    assert run_ranks(load_one, 1, saved / "iter_0000001")[0][0] == 1
    assert find_checkpoint(saved) == saved / "iter_0000002"
    assert find_checkpoint(saved / "iter_0000001") == saved / "iter_0000001"


def test_another_format_is_refused(run_copy: Path) -> None:
    checkpoint = run_copy / "iter_0000002"
    (checkpoint / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    write_manifest(checkpoint)
    assert "metadata.json: sharded_backend='zarr' cannot be read. Use torch_dist." in fails(run_copy)


def save_as_other_programs_do(folder: Path) -> None:
    engine = checkpoint_model.build(language=SMALLEST, seed=5)
    checkpoint_model.train(engine, 0, 1)
    folder.mkdir(parents=True)
    dist_checkpointing.save(engine.sharded_state_dict(with_optimizer=True), str(folder))


def load_from_other_programs(path: Path, verify: bool) -> list[float]:
    engine = checkpoint_model.build(language=SMALLEST, seed=99)
    loaded = load_checkpoint(path, engine, with_optimizer=True, verify=verify)
    assert (loaded.iteration, loaded.extra) == (7, {})
    result = checkpoint_model.train(engine, 1, 1)
    checkpoint_model.leave()
    engine = checkpoint_model.build(language=SMALLEST, seed=5)
    checkpoint_model.train(engine, 0, 1)
    assert checkpoint_model.train(engine, 1, 1) == result
    return result


def test_checkpoints_of_other_programs_load_without_verification(tmp_path: Path) -> None:
    run_ranks(save_as_other_programs_do, 1, tmp_path / "iter_0000007")
    run_ranks(load_from_other_programs, 1, tmp_path, False)
    said = fails(tmp_path, with_optimizer=True)
    assert "manifest.json: is missing, so iter_0000007 is not complete, or another program wrote it." in said
    assert "load without verification if you trust it" in said


def test_a_tracker_that_disagrees_is_told(run_copy: Path) -> None:
    (run_copy / "latest_checkpointed_iteration.txt").write_text("1")
    lines, iteration = run_ranks(load_and_listen, 1, run_copy)[0]
    assert iteration == 2
    assert any(
        "latest_checkpointed_iteration.txt says 1, but the newest checkpoint is 2: taking 2" in line for line in lines
    )


def load_and_listen(path: Path) -> tuple[list[str], int]:
    with checkpoint_model.log_lines() as lines:
        iteration = load_one(path)[0]
    return lines, iteration


def save_release(folder: Path) -> None:
    engine = checkpoint_model.build(language=SMALLEST, with_optimizer=False, seed=5)
    save_checkpoint(folder, "release", engine, with_optimizer=False)


def test_release_gives_weights_and_no_run(tmp_path: Path) -> None:
    run_ranks(save_release, 1, tmp_path)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    assert run_ranks(load_one, 1, tmp_path)[0] == (0, (), ())
    assert "release: holds weights only, so a run cannot be resumed from it." in fails(tmp_path, with_optimizer=True)
