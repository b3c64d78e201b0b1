"""Near duplicates: the first of each group stays, whatever the number of ranks, and nothing unlike is lost."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from harness import run_ranks
from PIL import Image

from megavlm.data import Conversation
from megavlm.filters import NearDuplicateSettings, filter_near_duplicates, open_source
from megavlm.filters.near_duplicates import find_near_duplicates
from megavlm.filters.signature import Signature, Signer, image_bands, shingles
from megavlm.prepare import PrepareSettings, prepare

pytest.importorskip("datasketch")
pytest.importorskip("imagehash")

LONG = "the quick brown fox jumps over the lazy dog near the old river bank while the sun goes down slowly"


def write_picture(path: Path, seed: int, size: int = 64, noise: int = 0) -> None:
    """A smooth picture; some noise makes a near copy of it."""
    coarse = numpy.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=numpy.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    pixels = numpy.asarray(image).astype(int)
    pixels += numpy.random.default_rng(99).integers(-noise, noise + 1, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8)).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """0 stands alone, 1 has 0's text with another image, 2 nearly is 0, 3 has 0's image with another text, ..."""
    write_picture(tmp_path / "a.png", 1)
    write_picture(tmp_path / "a2.png", 1, size=96, noise=3)
    write_picture(tmp_path / "b.png", 2)
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "caption": LONG},
        {"image": "b.png", "caption": LONG},
        {"image": "a2.png", "caption": LONG.upper().replace(" ", "  ") + "!"},
        {"image": "a2.png", "caption": "something else entirely, of another day and place"},
        {"text": "a document without any image, which stands here on its own"},
        {"text": "A document without any image, which stands here on its own."},
        {"image": "gone.png", "caption": "no image"},
        {"image": "a.png", "caption": LONG},
    ]
    (tmp_path / "gone.png").write_text("no image")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("compared", "kept"), [("both", [0, 1, 3, 4]), ("text", [0, 3, 4]), ("image", [0, 1, 4, 5])])
def test_the_first_of_each_group_stays(source: Path, tmp_path: Path, compared: Any, kept: list[int]) -> None:
    out = tmp_path / "out"
    assert filter_near_duplicates(open_source(source), out, NearDuplicateSettings(compared)) == kept
    rows = [json.loads(line) for line in (out / "kept.jsonl").read_text().splitlines()]
    everything = [json.loads(line) for line in source.read_text().splitlines()]
    assert rows == [everything[number] for number in kept]
    report = json.loads((out / "report.json").read_text())
    assert (report["num_samples"], report["num_kept"]) == (8, len(kept))
    assert report["reasons"] == {"image_unreadable": 1}
    assert report["num_dropped"] == 7 - len(kept)
    assert (out / "report.png").stat().st_size > 10_000


def _filter(source: str, out: str) -> list[int]:
    return filter_near_duplicates(open_source(Path(source)), Path(out), NearDuplicateSettings())


def test_ranks_change_nothing(source: Path, tmp_path: Path) -> None:
    alone = filter_near_duplicates(open_source(source), tmp_path / "alone", NearDuplicateSettings())
    assert run_ranks(_filter, 2, str(source), str(tmp_path / "two")) == [alone, alone]
    assert (tmp_path / "two/scores.jsonl").read_text() == (tmp_path / "alone/scores.jsonl").read_text()
    assert (tmp_path / "two/kept.jsonl").read_text() == (tmp_path / "alone/kept.jsonl").read_text()


def test_it_goes_on_where_it_was(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, settings = tmp_path / "out", NearDuplicateSettings()
    kept = filter_near_duplicates(open_source(source), out, settings)
    whole = (out / "scores.jsonl").read_bytes()
    (out / "scores.jsonl").write_bytes(whole[:-30])  # killed while writing
    calls = []
    sign = Signer.sign
    monkeypatch.setattr(Signer, "sign", lambda *arguments: calls.append(1) or sign(*arguments))
    assert filter_near_duplicates(open_source(source), out, settings) == kept
    assert len(calls) <= 8
    calls.clear()
    assert filter_near_duplicates(open_source(source), out, NearDuplicateSettings("text")) == [0, 3, 4]
    assert not calls
    with pytest.raises(ValueError, match=r"--out=.*: holds scores with other settings: num_permutations was 128"):
        filter_near_duplicates(open_source(source), out, NearDuplicateSettings(num_permutations=64))


def test_shards_get_a_keep_file(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "shards", PrepareSettings(num_workers=0, samples_per_shard=3))
    filter_near_duplicates(open_source(tmp_path / "shards"), tmp_path / "out", NearDuplicateSettings())
    names = (tmp_path / "out/keep.txt").read_text().split()
    assert names == ["shard-000000.tar[0]", "shard-000000.tar[1]", "shard-000001.tar[0]", "shard-000001.tar[1]"]


def test_minhash_estimates_jaccard() -> None:
    words = [f"word{number}" for number in range(400)]
    signer = Signer(256)
    for shared in (100, 200, 300):
        texts = [" ".join(words[:300]), " ".join(words[300 - shared : 600 - shared])]
        one, two = (signer.sign(text, open_nothing()) for text in texts)
        sets = [set(shingles(text)) for text in texts]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        # standard error sqrt(J (1 - J) / 256) is at most 0.031; worst seen 0.031
        assert abs(one.text_similarity(two) - exact) < 0.1


def open_nothing() -> Any:
    return Conversation(())


@pytest.mark.parametrize("most_bits", [0, 1, 4, 16])
def test_near_images_share_a_band(most_bits: int) -> None:
    random = numpy.random.default_rng(0)
    for _ in range(200):
        number = int(random.integers(0, 2**63)) * 2 + 1
        other = number
        for bit in random.choice(64, most_bits, replace=False):
            other ^= 1 << int(bit)
        assert set(image_bands(number, most_bits)) & set(image_bands(other, most_bits))


@pytest.mark.parametrize("compared", ["both", "text", "image"])
def test_bands_lose_no_near_duplicate(compared: Any) -> None:
    """Against comparing all with all."""
    random = numpy.random.default_rng(1)
    settings = NearDuplicateSettings(compared, text_similarity=0.8, image_bits=3, num_permutations=64)
    signatures: dict[int, Signature] = {}
    for number in range(120):
        if number % 3 and signatures:
            text, image = signatures[number - 1].text.copy(), signatures[number - 1].images[0]
            text[random.choice(64, int(random.integers(0, 20)), replace=False)] = 7
            for bit in random.choice(64, int(random.integers(0, 6)), replace=False):
                image ^= 1 << int(bit)
        else:
            text, image = random.integers(8, 2**32 - 1, 64).astype(numpy.uint32), int(random.integers(0, 2**63))
        signatures[number] = Signature(text, (image,))
    kept: list[int] = []
    for number, signature in signatures.items():
        alike = [
            other
            for other in kept
            if (compared == "image" or signature.text_similarity(signatures[other]) >= 0.8)
            and (compared == "text" or signature.image_distance(signatures[other]) <= 3)  # type: ignore[operator]
        ]
        if not alike:
            kept.append(number)
    matches = find_near_duplicates(signatures, settings)
    assert 10 < len(matches) < 110
    assert [number for number in signatures if number not in matches] == kept


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"text_similarity": 0.4}, r"--text-similarity=0.4: must be from 0.5 to 1"),
        ({"image_bits": 17}, r"--image-bits=17: must be from 0 to 16"),
        ({"num_permutations": 30}, r"--permutations=30: must be at least 32"),
    ],
)
def test_numbers_out_of_range(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        NearDuplicateSettings(**change).check()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(
        ValueError, match=r"needs the package datasketch. Install it: pip install -r requirements-filters"
    ):
        Signer(128)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source=.*x.csv: is no folder of shards and no .json or .jsonl file"):
        open_source(tmp_path / "x.csv")
