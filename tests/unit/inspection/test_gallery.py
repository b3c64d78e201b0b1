"""The pages of ``megavlm data inspect``: they say what the batches hold, and nothing of the data can break out."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from made_up_run import RECIPE, write_tokenizer
from PIL import Image

from megavlm.cli import main
from megavlm.config import load_recipe
from megavlm.data import Loader, PackedLoader
from megavlm.inspection import inspect_data
from megavlm.inspection.card import SampleCard
from megavlm.inspection.card_maker import CardMaker
from megavlm.inspection.gallery import open_source
from megavlm.inspection.histogram import histogram
from megavlm.inspection.step import MicroBatch, UnusedSample, micro_batches
from megavlm.inspection.summary import SampleCounts, counts_of
from megavlm.inspection.view import SampleView
from megavlm.recipe import Recipe

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
HOSTILE += " \u202e\u05e9\u05dc\u05d5\u05dd \U0001f600 \x07"
NAME = 'ta\'ll "<b>".png'
FUSIONS = ("decoder_only", "cross_attention", "hybrid")
PACKING = ("data.packing=null", "data.packing={buffer_size: 4}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    Image.new("RGB", (120, 60), (200, 30, 30)).save(folder / "wide.png")
    Image.new("RGB", (30, 90), (30, 200, 30)).save(folder / NAME)
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])  # its header is whole
    turns = [{"from": "human", "value": "<image>\n<image>\nWhat?"}, {"from": "gpt", "value": HOSTILE}]
    chats: list[dict[str, Any]] = [
        {"conversations": turns, "image": ["wide.png", NAME]},
        {"question": "Two and two?", "answer": "Four."},
        {"question": "Cut off?", "answer": "Yes.", "image": "cut.jpg"},
    ]
    documents: list[dict[str, Any]] = [
        {"texts": ["Before ", None, " after"], "images": [None, NAME, None]},
        {"text": "far too long " * 200},
        {"text": "short"},
    ]
    for name, rows in (("chats", chats), ("documents", documents)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tokenizer(folder)
    text = RECIPE.replace("FOLDER", str(folder)).replace("name: chats", 'name: "<i>chats"')
    text = text.replace("  seq_length", f"  valid: {{kind: jsonl, path: {folder}/chats.jsonl}}\n  seq_length")
    (folder / "recipe.yaml").write_text(text)
    return folder


def load(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", overrides, Recipe)


def inspect(recipe: Recipe, out: Path, **settings: Any) -> list[Path]:
    return inspect_data(recipe, title="a recipe", out=out, **settings)


def looked_at(recipe: Recipe, start: int, stop: int, split: Any = "train") -> list[MicroBatch]:
    return list(micro_batches(open_source(recipe, split), start, stop))


class Page(HTMLParser):
    """The elements of a page, and the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_samples_stand_where_the_batches_have_them(folder: Path, fusion: str, packing: str) -> None:
    """Batches are those of a loader that training would make; each card's facts are its batch's tensors."""
    recipe = load(folder, f"model.fusion.kind={fusion}", packing, "training.global_batch_size=4")
    source = open_source(recipe, "train")
    found = looked_at(recipe, 0, 6)
    settings: dict[str, Any] = {"micro_batch_size": 2, "global_batch_size": 4, "data_parallel_rank": 0}
    settings |= {"data_parallel_size": 1, "seed": recipe.training.seed, "pad_multiple": recipe.engine.pad_multiple}
    loader: Loader | PackedLoader = (
        PackedLoader(source.dataset, source.processor, recipe.data.packing, **settings)
        if recipe.data.packing
        else Loader(source.dataset, source.processor, **settings)
    )
    steps = iter(loader)
    batches = [batch for _ in range(found[-1].step + 1) for batch in next(steps)]
    maker = CardMaker(source.processor, source.names)
    seen: list[int] = []
    for micro_batch, batch in zip(found, batches, strict=False):
        assert all(torch.equal(value, batch.tensors()[name]) for name, value in micro_batch.batch.tensors().items())
        seen += [sample.number for sample in micro_batch.samples]
        filled = torch.zeros_like(batch.tokens, dtype=torch.bool)
        for placed in micro_batch.placed:
            there = slice(placed.start, placed.stop)
            sample = placed.view.sample
            assert torch.equal(batch.tokens[placed.row, there], sample.tokens)
            last_tile = placed.first_tile + sample.tiles.shape[0]
            assert torch.equal(batch.tiles[placed.first_tile : last_tile], sample.tiles)
            filled[placed.row, there] = True
        assert torch.equal(filled, ~batch.is_padding())
        for card in maker.cards(micro_batch, range(100)):
            if isinstance(card, SampleCard):
                placed = next(one for one in micro_batch.placed if one.number == card.number)
                check_facts(card, batch, placed.row, placed.first_tile)
    assert seen == list(range(len(seen)))
    assert len(seen) >= 6
    assert any(len({one.row for one in m.placed}) < len(m.placed) for m in found) == (recipe.data.packing is not None)


def check_facts(card: SampleCard, batch: Any, row: int, first_tile: int) -> None:
    """Position for position, as the page's script reads them."""
    facts = card.facts
    assert sum(run.num_tokens for run in card.runs) == len(facts["ids"]) == card.stop - card.start
    for place in range(card.stop - card.start):
        there = (row, card.start + place)
        assert facts["ids"][place] == batch.tokens[there]
        assert facts["labels"][place] == batch.labels[there]
        assert facts["position"] + place == batch.position_ids[there]
        [weight] = [change for change in facts["weights"] if change[0] <= place][-1][1:]
        assert weight == pytest.approx(float(batch.loss_mask[there]), abs=1e-6)  # rounded to six places
        first, stop = [change for change in facts["visible"] if change[0] <= place][-1][1:]
        assert [first + first_tile, stop + first_tile] == batch.visible_tiles[there].tolist()
    for number, (length, first, stop) in enumerate(facts["tiles"]):
        assert length == batch.tile_context[first_tile + number]
        assert (length > 0) == (first == stop)
        assert len({facts["ids"][place] for place in range(first, stop)}) <= 1


@pytest.mark.parametrize("packing", PACKING)
def test_a_look_from_the_middle_is_the_same_look(folder: Path, packing: str) -> None:
    recipe = load(folder, packing, "training.global_batch_size=2", "training.micro_batch_size=1")
    whole = {m.samples[0].number: m for m in looked_at(recipe, 0, 6)}
    part = looked_at(recipe, 3, 6)
    assert part
    assert part[0].samples[0].number <= 3 <= part[0].samples[-1].number
    for micro_batch in part:
        other = whole[micro_batch.samples[0].number]
        assert (micro_batch.step, micro_batch.number) == (other.step, other.number)
        assert torch.equal(micro_batch.batch.tokens, other.batch.tokens)


def test_validation_is_one_pass_in_the_order_of_the_file(folder: Path) -> None:
    samples = [one for m in looked_at(load(folder), 0, 3, "valid") for one in m.samples]
    keys = [one.view.key if isinstance(one, UnusedSample) else one.view.sample.key for one in samples]
    assert [key.rpartition(":")[2] for key in keys] == ["1", "2", "3"]


def test_counts_need_no_pixels(folder: Path) -> None:
    """What is counted from headers is what the samples have, where their pixels can be read."""
    source = open_source(load(folder, "data.seq_length=190", "data.over_length=truncate_text"), "train")
    counted, views = list(source.counts(range(6))), list(source.views(range(6)))
    usable = [(one, view) for one, view in zip(counted, views, strict=True) if isinstance(view, SampleView)]
    assert len(usable) == 5
    for one, view in usable:
        assert one == counts_of(view)
    assert sum(isinstance(one, SampleCounts) for one in counted) == 6


@pytest.mark.parametrize("packing", PACKING)
def test_nothing_of_the_data_breaks_out(folder: Path, tmp_path: Path, packing: str) -> None:
    one_lane = ("training.global_batch_size=2", packing.replace("4", "1"))  # all six samples are looked at
    [path] = inspect(load(folder, *one_lane), tmp_path / "new/look.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    scripts = page.all("script")
    assert [script for script in scripts if script.get("type") != "application/json"] == [{}]
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    addresses = [a[name] or "" for _, a in page.elements for name in ("src", "href") if name in a]
    assert addresses
    assert all(address.startswith(("#s", "data:image/")) for address in addresses)
    assert {tag for tag, _ in page.elements}.isdisjoint({"iframe", "object", "embed", "base", "link"})
    identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    [policy] = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "document.title='owned'" in page.text
    assert "<i>chats" in page.text
    assert 'ta\'ll "<b>".png' in page.text
    assert "\u202e" not in text
    assert "http" not in re.sub(r'http-equiv="|xmlns="http[^"]*"', "", text)
    for script in re.findall(r'class="facts">(.*?)</script>', text):
        json.loads(script)


def test_summary_and_broken_rows(folder: Path, tmp_path: Path) -> None:
    [path] = inspect(load(folder), tmp_path / "look.html")
    text = Page(path.read_text(encoding="utf-8")).text
    assert "Broken rows: 2" in text
    assert "image_unreadable: 1" in text
    assert "over_length: 1" in text
    assert re.search(r"do not fit data\.seq_length=400", text)
    assert "samples 0-5 of 6 usable" in text


def test_rows_that_opening_leaves_out_are_counted(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n' + "no <json>\n" * 12)
    recipe = load(folder, f"data.train={{kind: jsonl, path: {folder}/bad.jsonl, bad_rows: skip}}")
    [path] = inspect(recipe, tmp_path / "look.html")
    text = Page(path.read_text(encoding="utf-8")).text
    assert "Broken rows: 12" in text
    assert "10 of them listed" in text
    assert "found_at_opening: 12" in text


def test_a_page_for_each_sample(folder: Path, tmp_path: Path) -> None:
    index, *pages = inspect(load(folder), tmp_path / "pages", mode="sample", num_samples=3, start=1)
    assert index.name == "index.html"
    assert [page.name for page in pages] == ["0001.html", "0002.html", "0003.html"]
    links = {attributes["href"] for attributes in Page(index.read_text(encoding="utf-8")).all("a")}
    assert links == {page.name for page in pages}
    for page in pages:
        found = Page(page.read_text(encoding="utf-8"))
        assert len(found.all("article")) == 1
        assert "index.html" in {attributes["href"] for attributes in found.all("a")}


def test_a_page_stays_small(folder: Path, tmp_path: Path) -> None:
    """Noise, which no picture format shrinks, in 13 tiles; docs/DATA.md says how large pages are."""
    Image.frombytes("RGB", (900, 675), Random(0).randbytes(900 * 675 * 3)).save(folder / "noise.png")
    (folder / "noise.jsonl").write_text('{"image": "noise.png", "caption": "Noise."}\n')
    recipe = load(
        folder,
        f"data.train={{kind: jsonl, path: {folder}/noise.jsonl}}",
        *("model.vision.image_size=224", "model.vision.patch_size=28", "data.seq_length=900"),
        "data.tiling={kind: dynamic, max_tiles: 12}",
    )
    [path] = inspect(recipe, tmp_path / "look.html")
    text = path.read_text(encoding="utf-8")
    assert text.count('class="tile c') == 13
    assert 100_000 < len(text) < 600_000  # 532,816 measured; docs/DATA.md promises 15 MB of 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, r"--num=0, --start=0, --count=1000: must be at least 1, 0 and 1"),
        ({"num_counted": 0}, r"--num=24, --start=0, --count=0: must be at least 1, 0 and 1"),
        ({"start": -1}, r"--num=24, --start=-1"),
        ({"start": 6}, r"--start=6: data.train has 6 usable sample\(s\), numbers 0 to 5"),
        ({"start": 3, "split": "valid"}, r"--start=3: data.valid has 3 usable"),
        (
            {"start": 2, "split": "valid"},
            r"data.valid: none of the 1 sample\(s\) from 2 on can be used; the first: .*cut",
        ),
        ({"out": "page.html", "mode": "sample"}, r"--out=page.html: --mode sample writes a folder"),
    ],
)
def test_wrong_settings(folder: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    settings = {"out": tmp_path / "look.html"} | settings
    settings["out"] = Path(settings["out"])
    with pytest.raises(ValueError, match=message):
        inspect_data(load(folder), title="a recipe", **settings)
    assert not (tmp_path / "look.html").exists()


def test_wrong_places(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.html").mkdir()
    for out in ("file", "file/look.html"):
        with pytest.raises(ValueError, match=r"--out=.*file.*: cannot be written \("):
            inspect(load(folder), tmp_path / out)
    with pytest.raises(ValueError, match=r"--out=.*folder.html is a folder. Name a file"):
        inspect(load(folder), tmp_path / "folder.html")
    with pytest.raises(ValueError, match=r"--split=valid: the recipe has no data.valid"):
        inspect(load(folder, "data.valid=null"), tmp_path / "look.html", split="valid")


def test_the_command_ends_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    words = ["data", "inspect", str(folder / "recipe.yaml"), "--num", "2"]
    with pytest.raises(
        SystemExit, match=r"^megavlm data inspect: error: --out=.*file: cannot be written \(.*\)\. Choose"
    ):
        main([*words, "--out", str(tmp_path / "file")])
    main([*words, "--mode", "sample", "--out", str(tmp_path / "pages")])
    assert "index.html: 3 page(s), 0." in capsys.readouterr().out


@pytest.mark.parametrize("counts", [{}, {5: 2}, {1: 1, 13: 4}, {n * 7: n + 1 for n in range(300)}, {0: 3, 10**6: 1}])
def test_histograms_hold_everything(counts: dict[int, int]) -> None:
    drawn = histogram(counts)
    assert sum(bar.count for bar in drawn.bars) == sum(counts.values())
    assert len(drawn.bars) <= 24
    assert all(bar.height >= 0 and bar.x >= 0 and bar.x + bar.width <= 400 for bar in drawn.bars)


def luminance(colour: str) -> float:
    """Of WCAG 2.2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_can_be_read(scheme: int) -> None:
    """Contrast of 4.5 or more, as WCAG asks; least measured: 5.3 (bad rows, light), 5.5 (lit tokens, dark)."""
    style = (Path(inspect_data.__code__.co_filename).parent / "template/page.css").read_text(encoding="utf-8")
    colours = dict(
        re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme])
    )
    backs = ["page", "card", "system", "user", "assistant", "document", "template", "special", "tag", "image"]
    pairs = [("text", back) for back in backs]
    pairs += [("lit-text", "lit"), ("dim", "page"), ("dim", "card"), ("accent", "page"), ("accent", "card")]
    pairs += [("bad", "bad-back"), ("bad", "card"), ("dim", "bad-back")]
    for front, back in pairs:
        lighter, darker = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (front, back)
