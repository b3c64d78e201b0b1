"""Build the quickstart's data: pages of handwritten numbers, questions about them, and a tokenizer.

The handwriting is real (see ``pages.py``). The scans of digits are divided, digit by digit, into scans for training and
scans for the held-out questions; no held-out scan is trained on. A page is a grid of cells with a two-digit number in
each. Dynamic tiling (up to six tiles of 32 x 32 pixels) cuts it into one tile a cell; a thumbnail of four or more cells
is too coarse to read, and a row, a column or a whole page takes several tiles.

    python examples/quickstart/build_data.py --out data/quickstart

writes, always the same bytes for the same settings:

    images/*.png           the pages
    stage1_train.jsonl     pages of one number: learn to see
    stage2_train.jsonl     pages of one to six numbers, several questions in each row: learn where to look
    valid.jsonl            one question in each row, about held-out scans only
    tokenizer.model        SentencePiece, trained on the quickstart's own words
    blind.json             for each question text, its most frequent answer in training
    settings.json          what the folder was built from

Rows are in the LLaVA format (``id``, ``image``, ``conversations``). The ``id`` of a held-out row ends in the kind of
its question. The folder appears whole or not at all: it is built beside ``--out`` and renamed at the end.
"""

import argparse
import collections
import dataclasses
import io
import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from pages import GRIDS, Page, Scans, draw_page, draw_question, grid_weights
from PIL import Image
from rich.console import Console
from rich.progress import Progress

Row = dict[str, object]
"""One line of a JSONL file."""

TRAINED_ROW_TOKENS = 150
"""A row of several questions takes questions up to about this many tokens, so that all rows are about equally long."""
TILE_TOKENS = 7
"""Of one tile in a row: three of the tag, four of the image."""
TURN_TOKENS = 10
"""Of the chat's own marks around one question and its answer."""

CONTROL_SYMBOLS = ("<|im_start|>", "<|im_end|>", "<image>")
CHAT_WORDS = (
    *(f"<tile_{k}>" for k in range(1, 7)),
    "<tile_global_thumbnail>",
    "<Image>",
    "</Image>",
    "user",
    "assistant",
)
"""Ordinary text that each prompt holds beside the question."""
FORMAT = 1
"""Raise it when the same settings give other bytes than before."""


@dataclass(frozen=True)
class Settings:
    """What decides every byte of the data; kept as ``settings.json``."""

    seed: int = 1
    num_stage1: int = 6000
    num_stage2: int = 12000
    num_valid: int = 500
    vocab_size: int = 512

    def __post_init__(self) -> None:
        for name in ("num_stage1", "num_stage2", "num_valid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: each file needs at least 1 row. Raise {name}.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: is below 0. Give 0 or more.")


@dataclass(frozen=True)
class Part:
    """One JSONL file: which pages it shows and how it asks about them."""

    most_numbers: int
    held_out: bool
    several_questions: bool


PARTS: Mapping[str, Part] = {
    "stage1_train": Part(most_numbers=1, held_out=False, several_questions=False),
    "stage2_train": Part(most_numbers=6, held_out=False, several_questions=True),
    "valid": Part(most_numbers=6, held_out=True, several_questions=False),
}


def estimate_tokens(text: str) -> int:
    """Return about how many tokens ``text`` takes: one for each word, digit, mark and space before a digit."""
    return len(re.findall(r" ?[A-Za-z]+|\d|[^\w]", text))


def draw_conversation(page: Page, rng: np.random.Generator) -> dict[str, str]:
    """Return different questions about ``page`` with their answers, enough to fill a row of about the same length.

    They stay in random order. With the long answers last, each number had been given before it was read in a row, and
    the model learnt to copy it from there.
    """
    answers: dict[str, str] = {}
    tokens = TILE_TOKENS * (len(page.numbers) + 1)
    for _ in range(8):  # a page of one number has three different questions, a row that is full ends the loop before
        _, text, answer = draw_question(page, rng)
        tokens += TURN_TOKENS + estimate_tokens(text) + estimate_tokens(answer)
        if answers and tokens > TRAINED_ROW_TOKENS:
            break
        answers[text] = answer
    return answers


def make_row(part_name: str, index: int, scans: Scans, settings: Settings) -> tuple[Row, Page, Image.Image]:
    """Return row ``index`` of one file with its page and its picture; depends on nothing but the arguments."""
    part = PARTS[part_name]
    rng = np.random.default_rng([settings.seed, list(PARTS).index(part_name), index])
    columns, rows = GRIDS[rng.choice(len(GRIDS), p=grid_weights(part.most_numbers))]
    page = Page(columns, rows, tuple(f"{number:02d}" for number in rng.integers(0, 100, columns * rows)))
    picture = draw_page(page, scans, rng)
    if part.several_questions:
        kind, answers = "chat", draw_conversation(page, rng)
    else:
        kind, text, answer = draw_question(page, rng)
        answers = {text: answer}
    turns = [
        {"from": who, "value": value}
        for turn in answers.items()
        for who, value in zip(("human", "gpt"), turn, strict=True)
    ]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    name = f"{part_name.removesuffix('_train')}-{index:05d}"
    return {"id": f"{name}-{kind}", "image": f"images/{name}.png", "conversations": turns}, page, picture


def turns_of(row: Row) -> list[tuple[str, str]]:
    """Return the (question, answer) pairs of a row, without the image's place."""
    values = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]  # type: ignore[attr-defined]
    return list(zip(values[::2], values[1::2], strict=True))


def blind_answers(rows: Iterable[Row]) -> dict[str, str]:
    """Return, for each question text, its most frequent answer: the best that can be done without the picture."""
    counts: dict[str, collections.Counter[str]] = {}
    for row in rows:
        for question, answer in turns_of(row):
            counts.setdefault(question, collections.Counter())[answer] += 1
    return {
        question: min(found.items(), key=lambda item: (-item[1], item[0]))[0]
        for question, found in sorted(counts.items())
    }


def train_tokenizer(rows: Sequence[Row], vocab_size: int) -> bytes:
    """Train SentencePiece on the questions, the answers and the chat's own words.

    Digits are always single tokens and spaces are kept as they are, so that decoding gives the same text back. Bytes
    stand for what the quickstart's words do not cover.
    """
    text = [line for row in rows for turn in turns_of(row) for line in turn]
    text += [word for word in CHAT_WORDS for _ in range(len(rows))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        control_symbols=list(CONTROL_SYMBOLS),
        byte_fallback=True,
        split_digits=True,
        split_by_unicode_script=False,
        max_sentencepiece_length=24,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_rows(part_name: str, count: int, settings: Settings, folder: Path, progress: Progress) -> list[Row]:
    """Write one JSONL file and its pictures into ``folder``; return the rows."""
    scans = Scans(held_out=PARTS[part_name].held_out)
    rows = []
    for index in progress.track(range(count), description=f"{part_name}.jsonl"):
        row, _, picture = make_row(part_name, index, scans, settings)
        picture.save(folder / str(row["image"]), compress_level=1)  # faster, and no larger here
        rows.append(row)
    (folder / f"{part_name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def is_built(out: Path, settings: Settings) -> bool:
    """Return whether ``out`` already holds the data of these settings.

    Raises:
        ValueError: ``out`` holds something that this command did not write, which it must not replace.
    """
    if not out.exists():
        return False
    saved = out / "settings.json"
    if not saved.is_file():
        raise ValueError(
            f"out={out} exists and has no settings.json, so it is not a folder of this command. Choose another."
        )
    return json.loads(saved.read_text(encoding="utf-8")) == describe(settings)


def describe(settings: Settings) -> dict[str, int]:
    """Return what ``settings.json`` holds."""
    return {"format": FORMAT, **dataclasses.asdict(settings)}


def build(settings: Settings, out: Path, console: Console) -> None:
    """Build the data in ``out``, or do nothing when it is there already.

    Raises:
        ValueError: ``out`` holds something that this command did not write.
    """
    if is_built(out, settings):
        console.print(f"{out} is already built with these settings.", soft_wrap=True)
        return
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    (partial / "images").mkdir(parents=True)
    counts = {"stage1_train": settings.num_stage1, "stage2_train": settings.num_stage2, "valid": settings.num_valid}
    with Progress(console=console) as progress:
        rows = {name: write_rows(name, count, settings, partial, progress) for name, count in counts.items()}
    trained = rows["stage1_train"] + rows["stage2_train"]
    (partial / "tokenizer.model").write_bytes(train_tokenizer(trained, settings.vocab_size))
    blind = blind_answers(trained)
    (partial / "blind.json").write_text(json.dumps(blind, indent=1) + "\n", encoding="utf-8")
    (partial / "settings.json").write_text(json.dumps(describe(settings), indent=1) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    held_out = [turn for row in rows["valid"] for turn in turns_of(row)]
    share = sum(blind.get(question) == answer for question, answer in held_out) / len(held_out)
    console.print(
        f"{out}: {len(trained)} training rows, {len(held_out)} held-out questions ({share:.1%} right without looking).",
        soft_wrap=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Build the data of the quickstart.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=int, default=field.default, help="default %(default)s"
        )
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    try:
        build(Settings(**options), out, Console())
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
