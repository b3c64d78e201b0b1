"""The look inside samples: every token is told apart, and what is drawn and printed is what training gets."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_run import RECIPE, write_tokenizer
from PIL import Image
from rich.console import Console

from megavlm.build import build_processor
from megavlm.config import load_recipe
from megavlm.inspection import SampleView, SkippedView, show_data, view_samples
from megavlm.recipe import Recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sources: chats with images, and documents of which one is too long and one has a broken image."""
    Image.new("RGB", (120, 60), (200, 30, 30)).save(tmp_path / "wide.png")
    Image.new("RGB", (30, 90), (30, 200, 30)).save(tmp_path / "tall.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    chats = [
        {
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nWhat?"},
                {"from": "gpt", "value": "Red $x$."},
                {"from": "human", "value": "And?"},
                {"from": "gpt", "value": "Green."},
            ],
            "image": ["wide.png", "tall.png"],
        },
        {"question": "Two and two?", "answer": "Four."},
    ]
    documents = [
        {"texts": ["Before ", None, " after"], "images": [None, "tall.png", None]},
        {"text": "far too long " * 200},
        {"text": "no <image>", "image": "broken.png"},
    ]
    for name, rows in (("chats", chats), ("documents", documents)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tokenizer(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("FOLDER", str(tmp_path)))
    return tmp_path


def load(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", overrides, Recipe)


def views(recipe: Recipe, count: int = 8) -> list[SampleView | SkippedView]:
    train = recipe.data.train
    settings: dict[str, Any] = {"seed": recipe.training.seed, "shuffle": recipe.data.shuffle}
    processor = build_processor(recipe)
    return list(view_samples(train.build(), train.source_names, processor, range(count), **settings))


@pytest.mark.parametrize("tags", ["1d", "none", "separators", "2d_box"])
@pytest.mark.parametrize("fusion", ["decoder_only", "cross_attention", "hybrid"])
def test_every_token_is_told_apart(folder: Path, tags: str, fusion: str) -> None:
    recipe = load(folder, f"model.fusion.kind={fusion}", f"data.tile_tags={tags}")
    processor = build_processor(recipe)
    seen = 0
    for view in views(recipe):
        if isinstance(view, SkippedView):
            continue
        seen += 1
        sample, kinds = view.sample, view.kinds()
        assert len(kinds) == sample.num_tokens
        trained = torch.tensor([False, *(sample.loss_mask[:-1] > 0).tolist()])
        assert [kind == "trained" for kind in kinds] == trained.tolist()
        is_image = (sample.tokens == processor.tokenizer.image_token_id).tolist()
        assert [kind == "image" for kind in kinds] == is_image
        for span in view.spans:
            if span.kind == "image":
                assert sample.tile_spans[span.tile].tolist() == [span.start, span.stop]
        assert sum(image.layout.num_tiles for image in view.images) == sample.tiles.shape[0]
        assert kinds.count("tag") + kinds.count("image") == sum(sample.tokens_per_image)
    assert seen >= 4


def test_samples_come_in_training_order_with_their_sources(folder: Path) -> None:
    found = views(load(folder))
    by_source = {view.source for view in found}
    assert by_source == {"chats", "documents"}
    for view in found:
        key = view.skipped.key if isinstance(view, SkippedView) else view.sample.key
        assert f"{view.source}.jsonl" in key
    reasons = {view.skipped.reason for view in found if isinstance(view, SkippedView)}
    assert reasons == {"over_length", "image_unreadable"}


@pytest.mark.parametrize("packing", ["data.packing=null", "data.packing={buffer_size: 8}"])
def test_what_is_printed_and_drawn(folder: Path, packing: str) -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    summaries = show_data(load(folder, packing), num_samples=8, start=0, out=folder / "out", console=console)
    text = out.getvalue()
    for piece in (
        "{{Red $x$.<#",
        "SKIPPED: over_length: ",
        "SKIPPED: image_unreadable: image=",
        "user assistant user assistant, ",
        "<tile_1>[4 x tile 0]",
        "document, ",
    ):
        assert piece in text, text
    assert sum(one.num_samples for one in summaries) + sum(sum(one.reasons.values()) for one in summaries) == 8
    tree = json.loads((folder / "out/summary.json").read_text())
    assert [source["name"] for source in tree["sources"]] == ["chats", "documents"]
    assert {row["reason"] for row in tree["skipped"]} == {"over_length", "image_unreadable"}
    drawn = sorted(path.name for path in (folder / "out").glob("*.png"))
    assert len(drawn) == sum(one.num_samples for one in summaries) + 1
    assert drawn[-1] == "rows.png"
    for name in drawn:
        with Image.open(folder / "out" / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20, name


def test_degraded_images_are_named(folder: Path) -> None:
    out = io.StringIO()
    recipe = load(folder, "data.seq_length=190")
    [chats, _] = show_data(recipe, num_samples=8, start=0, out=None, console=Console(file=out, width=200))
    assert chats.num_degraded > 0
    assert "DEGRADED" in out.getvalue()
    assert "images degraded: " in out.getvalue()


def test_numbers_out_of_range(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--num=0, --start=0: must be at least 1 and 0"):
        show_data(load(folder), num_samples=0, start=0, out=None, console=Console(file=io.StringIO()))
    (folder / "file").touch()
    with pytest.raises(ValueError, match=r"--out=.*file: cannot be written"):
        show_data(load(folder), num_samples=1, start=0, out=folder / "file", console=Console(file=io.StringIO()))
