"""What a person gets wrong: one clear error before training where it can be known, else a skipped sample."""

import json
import re
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_one_error, losses
from PIL import Image

Run = Callable[..., subprocess.CompletedProcess[str]]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(image: str | None, text: str = "what is it", answer: str = "it is 1") -> dict[str, Any]:
    question = f"<image>\n{text}" if image else text
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns} if image else {"conversations": turns}


def bomb(path: Path) -> Path:
    """A PNG of a few bytes that says it has 60000 x 60000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with one good image and several that only show what they are when they are read."""
    folder = tmp_path / "images"
    folder.mkdir()
    good = Image.effect_noise((56, 28), 50).convert("RGB")
    good.save(folder / "good.png")
    good.save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("this is no picture")
    bomb(folder / "bomb.png")
    (folder / "empty.png").write_bytes(b"")
    return folder


def test_unreadable_images_are_skipped_counted_and_said(
    megavlm: Run, recipe: Path, images: Path, tmp_path: Path
) -> None:
    bad = ["truncated.jpg", "text.png", "bomb.png", "empty.png"]
    data = write_rows(tmp_path / "rows.jsonl", [row("good.png"), row(None), *map(row, bad), row("good.png"), row(None)])
    result = megavlm(
        "train",
        recipe,
        f"data.train.path={data}",
        f"data.train.image_root={images}",
        "data.valid=null",
        "training.train_iters=4",
        "checkpoint.save_interval=4",
        "training.micro_batch_size=1",  # some micro-batches then hold nothing but an unusable sample
        "--nproc-per-node",
        2,
    )
    assert result.returncode == 0, result.stdout
    assert "Traceback" not in result.stdout
    for name in bad:
        assert name in result.stdout
    assert "skipped samples: 16 |" in result.stdout  # 4 of the 8 rows, in each of 4 passes over them
    assert len(losses(tmp_path / "run")) == 4


def test_rows_known_to_be_bad_stop_the_run_before_it_starts(
    megavlm: Run, recipe: Path, images: Path, tmp_path: Path
) -> None:
    rows = [row("good.png"), "{ not json", row("missing.png"), {"conversations": []}, row("good.png")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    where = (f"data.train.path={data}", f"data.train.image_root={images}", "data.valid=null")
    result = megavlm("train", recipe, *where)
    assert_one_error(result, "rows.jsonl:2", "rows.jsonl:3", "missing.png", "rows.jsonl:4")
    assert not list(tmp_path.glob("run/iter_*"))
    skipping = megavlm("train", recipe, *where, "data.train.bad_rows=skip", "training.train_iters=4")
    assert skipping.returncode == 0, skipping.stdout
    assert "3 unusable rows left out" in skipping.stdout


def test_an_image_that_does_not_fit_loses_tiles_then_is_skipped(
    megavlm: Run, recipe: Path, images: Path, tmp_path: Path
) -> None:
    Image.effect_noise((28 * 3, 28 * 2), 50).convert("RGB").save(images / "large.png")
    rows = [row("large.png"), row("good.png", text="long " * 100), row(None)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    result = megavlm(
        "train",
        recipe,
        f"data.train.path={data}",
        f"data.train.image_root={images}",
        "data.valid=null",
        "data.seq_length=100",
        "training.train_iters=4",
    )
    assert result.returncode == 0, result.stdout
    assert "over_length" in result.stdout
    assert "rows.jsonl:2" in result.stdout
    assert "rows.jsonl:1" not in result.stdout
    degraded = re.search(r"images with fewer tiles: (\d+) \|", result.stdout)
    assert degraded
    assert int(degraded.group(1)) > 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.optimzer.lr=1"], ["training.optimzer", "Did you mean 'optimizer'?"]),
        (["training.optimizer.lr=fast"], ["training.optimizer.lr='fast'"]),
        (["data.train.path=/nowhere.jsonl"], ["/nowhere.jsonl"]),
        (["tokenizer.path=/nowhere.model"], ["tokenizer.path=/nowhere.model"]),
        (["engine.pipeline_model_parallel_size=3"], ["num_layers=2", "pipeline_model_parallel_size"]),
        (["engine.tensor_model_parallel_size=2"], ["world_size=1", "tensor_model_parallel_size"]),
        (["training.global_batch_size=7"], ["global_batch_size=7"]),
        (["model.language.vocab_size=20"], ["model.language.vocab_size=20", "the tokenizer has"]),
        (["checkpoint.pretrained_checkpoint=/nowhere"], ["/nowhere"]),
        (["checkpoint.save=/proc/nowhere"], ["checkpoint.save=/proc/nowhere: cannot be made"]),
        (["model.vision.image_size=30"], ["image_size=30", "patch_size=7"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in str(value[0]) else "",
)
def test_wrong_recipes_end_in_one_line(megavlm: Run, recipe: Path, overrides: list[str], words: list[str]) -> None:
    result = megavlm("train", recipe, *overrides)
    assert_one_error(result, "megavlm train: error:", *words)


def test_impossible_layout_is_said_once_before_ranks_start(megavlm: Run, recipe: Path) -> None:
    result = megavlm("train", recipe, "--nproc-per-node", 2, "engine.tensor_model_parallel_size=4")
    assert_one_error(result, "world_size=2", "tensor_model_parallel_size")
    assert result.stdout.count("error:") == 1


def test_a_damaged_checkpoint_is_named(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    short = ("training.train_iters=8", "checkpoint.save_interval=4")
    assert megavlm("train", recipe, *short).returncode == 0
    damaged = next((tmp_path / "run/iter_0000008").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    result = megavlm("train", recipe, *short, "training.train_iters=12")
    assert_one_error(result, damaged.name, "iter_0000004")  # names the file, and the older one that is intact


def test_a_folder_of_another_model_is_refused(megavlm: Run, recipe: Path) -> None:
    assert megavlm("train", recipe, "training.train_iters=4").returncode == 0
    result = megavlm("train", recipe, "model.language.num_layers=4")
    assert_one_error(result, "another model", "model.language", "num_layers")


def test_wrong_command_lines(megavlm: Run, recipe: Path, tmp_path: Path) -> None:
    assert_one_error(megavlm("train", tmp_path / "nowhere.yaml"), "nowhere.yaml: no such file")
    assert_one_error(megavlm("eval", tmp_path), "holds no checkpoint")
    assert "unrecognized arguments: --steps" in megavlm("train", recipe, "--steps", "3").stdout
    assert_one_error(megavlm("train", recipe, "--nproc-per-node", 0), "--nproc-per-node=0")
    dry = megavlm("train", recipe, "--dry-run")
    assert dry.returncode == 0
    assert "global_batch_size: 8" in dry.stdout
