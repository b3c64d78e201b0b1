"""Build the data of the comparisons: real handwriting, real pictures, real words.

    python examples/comparisons/build_comparisons.py --out data/comparisons

downloads two packages of npm (23 MB) and writes, each as JSONL with its pictures beside it:

    single      one handwritten digit                                        (scikit-learn's load_digits)
    page        nine digits in three rows, to be read                        (the same)
    coarse      the same pages in 16 pixels                                  (the same)
    strip       two to six digits in a line, on paper of many shapes         (the same)
    kind        emoji, to be sorted into eight kinds                         (fluent-emoji-3d, emojibase-data)
    series      emoji in series, their kinds under names made up for each    (fluent-emoji-3d, emojibase-data)
    noisy       emoji, every second one with the kind of another             (the same)
    words       names of things, to be told in German and French, no picture (the Unicode CLDR, of emojibase-data)

and a tokenizer. ``_train`` is to train on; ``_select`` to choose by; ``_test`` to measure on. Pictures of the last two
show scans and emoji that those to train on do not. Words have no held-out part: what is measured is what is kept.
The same settings give the same files.
"""

import argparse
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import sentencepiece
from PIL import Image

sys.path.extend(
    str(Path(__file__).resolve().parents[1] / name) for name in ("comparisons", "quickstart", "real_weights")
)

from episodes import in_series, with_wrong_answers
from packages import LABELS, PICTURES, download
from pages import Scans
from pictures import draw_digits, plain_code, read_emoji

LANGUAGES = {"de": "German", "fr": "French"}
KINDS = {0: "face", 1: "person", 3: "animal or plant", 4: "food", 5: "place", 6: "activity", 7: "object", 8: "sign"}
"""Emojibase's groups, without skin tones and flags."""
QUESTIONS = {
    "single": "Which digit is this?",
    "page": "Read the digits.",
    "strip": "Read the digits.",
    "kind": "What kind of thing is this?",
}
PARTS = ("train", "select", "test")
IMAGE = "<image>"
LONGEST_NAME = 14
"""Letters of a name in any language."""
COARSE_SIDE = 16
VOCAB_SIZE = 640


@dataclass(frozen=True)
class Settings:
    """How much of what."""

    num_single: int = 3000
    num_page: int = 8000
    num_strip: int = 8000
    num_series: int = 4000
    num_held_out: int = 240
    """Questions of each part that is not trained on."""
    num_names: int = 120
    """Things whose names are told, in each language."""
    seed: int = 1


Row = dict[str, Any]


def conversation(question: str, answer: str, image: str | None = None) -> Row:
    """A row: one question, one answer, with a picture or without."""
    start = "" if image is None else IMAGE
    turns = [{"from": "human", "value": start + question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({} if image is None else {"image": image})


def digits_of(kind: str, rng: numpy.random.Generator) -> tuple[str, int, tuple[int, int]]:
    """Draw what a picture of digits shows: the digits, its columns, and width and height of a cell in pixels."""
    count = {"single": 1, "page": 9, "strip": int(rng.integers(2, 7))}[kind]
    digits = "".join(map(str, rng.integers(0, 10, count)))
    side = int(rng.integers(18, 23) if kind == "page" else rng.integers(28, 37))
    if kind == "strip":
        return digits, count, (round(side * rng.uniform(0.75, 1.25)), side)
    return digits, round(count**0.5), (side, side)


def write_digits(kind: str, part: str, count: int, settings: Settings, folder: Path) -> list[Row]:
    """Draw pictures of digits into ``folder/images`` and give their rows."""
    scans = Scans(held_out=part != "train")
    place = [settings.seed, sorted(QUESTIONS).index(kind), PARTS.index(part)]
    rng = numpy.random.default_rng(place)
    rows = []
    for number in range(count):
        digits, columns, cell = digits_of(kind, rng)
        name = f"images/{kind}_{part}_{number:05d}.png"
        draw_digits(digits, columns, cell, scans, rng).save(folder / name)
        rows.append(conversation(QUESTIONS[kind], digits, name))
    return rows


def write_coarse(rows: Sequence[Row], folder: Path) -> list[Row]:
    """Write small copies of pictures; their rows."""
    copies = []
    for row in rows:
        name = str(row["image"]).replace("page", "coarse")
        with Image.open(folder / row["image"]) as picture:
            picture.resize((COARSE_SIDE, COARSE_SIDE), Image.Resampling.BOX).save(folder / name)
        copies.append({**row, "image": name})
    return copies


def read_labels(labels: Path) -> dict[str, list[Row]]:
    """Emojibase's entries by language; English is one of them."""
    found = {}
    with tarfile.open(labels) as archive:
        for language in ("en", *LANGUAGES):
            member = archive.extractfile(f"package/{language}/data.json")
            assert member is not None, language
            found[language] = json.load(member)
    return found


def write_kinds(
    entries: Sequence[Row], pictures: Mapping[str, Image.Image], settings: Settings, folder: Path
) -> dict[str, list[Row]]:
    """Divide emoji into the three parts and write their pictures; parts -> rows."""
    kinds = {plain_code(entry["hexcode"]): KINDS[entry["group"]] for entry in entries if entry.get("group") in KINDS}
    codes = numpy.array([code for code in pictures if code in kinds])
    shuffled = numpy.random.default_rng([settings.seed, 100]).permutation(codes).tolist()
    most = min(settings.num_held_out, len(shuffled) // 4)
    parts = {"select": shuffled[:most], "test": shuffled[most : 2 * most], "train": shuffled[2 * most :]}
    rows: dict[str, list[Row]] = {}
    for part, members in parts.items():
        rows[part] = []
        for code in members:
            name = f"images/kind_{code}.png"
            pictures[code].save(folder / name)
            rows[part].append(conversation(QUESTIONS["kind"], kinds[code], name))
    return rows


def words(labels: Mapping[str, Sequence[Row]], settings: Settings) -> list[Row]:
    """Questions for the names of things, without a picture: those that have short names everywhere."""
    by_code = {language: {row["hexcode"]: row["label"] for row in rows} for language, rows in labels.items()}
    names = [
        [by_code[language].get(code, "") for language in ("en", *LANGUAGES)]
        for code in sorted(code for code in by_code["en"] if "-" not in code)
    ]
    usable = [told for told in names if all(0 < len(name) <= LONGEST_NAME and ":" not in name for name in told)]
    chosen = numpy.random.default_rng([settings.seed, 200]).permutation(len(usable))[: settings.num_names]
    return [
        conversation(f"What is {usable[place][0]} in {language}?", told)
        for place in sorted(chosen.tolist())
        for language, told in zip(LANGUAGES.values(), usable[place][1:], strict=True)
    ]


def train_tokenizer(rows: Iterable[Row]) -> bytes:
    """Train a SentencePiece model on questions and answers; each digit is a token of its own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([turn["value"].removeprefix(IMAGE) for row in rows for turn in row["conversations"]]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        control_symbols=[IMAGE],
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def build(settings: Settings, out: Path) -> None:
    """Build everything in ``out``, unless it is there with the same settings.

    Raises:
        ValueError: ``out`` holds something else, or a package cannot be had.
    """
    told = json.dumps(asdict(settings), indent=1) + "\n"
    if out.exists():
        saved = out / "settings.json"
        if saved.is_file() and saved.read_text(encoding="utf-8") == told:
            print(f"{out} is already built with these settings.")
            return
        raise ValueError(f"out={out}: exists with other settings. Choose another, or remove it.")
    packages = out.with_name(out.name + ".packages")
    labels = read_labels(download(LABELS, packages))
    codes = {plain_code(entry["hexcode"]): "" for entry in labels["en"] if entry.get("group") in KINDS}
    pictures = read_emoji(download(PICTURES, packages), codes)
    new = out.with_name(out.name + ".partial")
    shutil.rmtree(new, ignore_errors=True)
    (new / "images").mkdir(parents=True)
    written: dict[str, list[Row]] = {}
    for kind in ("single", "page", "strip"):
        for part in PARTS:
            count = getattr(settings, f"num_{kind}") if part == "train" else settings.num_held_out
            written[f"{kind}_{part}"] = write_digits(kind, part, count, settings, new)
    for part in PARTS:
        written[f"coarse_{part}"] = write_coarse(written[f"page_{part}"], new)
    for part, rows in write_kinds(labels["en"], pictures, settings, new).items():
        written[f"kind_{part}"] = rows
    written["words_train"] = written["words_test"] = words(labels, settings)
    rng = numpy.random.default_rng([settings.seed, 300])
    for part, count in (("train", settings.num_series), ("test", settings.num_held_out)):
        written[f"series_{part}"] = in_series(written[f"kind_{part}"], count, rng)
    written["noisy_train"] = with_wrong_answers(written["kind_train"], rng)
    for name, rows in written.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (new / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(rows)} rows")
    taught = ("single_train", "page_train", "strip_train", "coarse_train", "kind_train", "words_train")
    tokenizer = train_tokenizer(row for name in taught for row in written[name])
    (new / "tokenizer.model").write_bytes(tokenizer)
    (new / "settings.json").write_text(told, encoding="utf-8")
    new.rename(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description="Build the data of the comparisons.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default, help="%(default)s")
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    try:
        build(Settings(**options), out)
    except (ValueError, OSError) as error:
        sys.exit(f"build_comparisons: error: {error}")


if __name__ == "__main__":
    main()
