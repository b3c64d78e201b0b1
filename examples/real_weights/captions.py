"""What a connector has learned: held-out loss with the right picture and with another, and captions before and after.

    python examples/real_weights/captions.py --runs UNTRAINED TRAINED --answers BEFORE.jsonl AFTER.jsonl --out FOLDER

prints a table and some captions, and writes ``captions.json`` (everything) and ``captions.png`` (pictures with both
captions). The losses are those of held_out.py. The answers are those of ``megavlm generate`` to the held-out rows; the
examples are spread evenly over these, none of them chosen.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from held_out import held_out_losses, table_of
from PIL import Image
from rich.console import Console
from rich.table import Table

from megavlm.data.image import load_image

matplotlib.use("Agg")  # no screen on a cluster

_COLUMNS = 4
_COLOURS = 128
"""Of the PNG's palette: a third of the size, and no difference to see."""


@dataclass(frozen=True)
class Example:
    """A held-out picture and what was said of it."""

    image: Path
    name: str
    before: str
    after: str


def read_examples(rows: Path, before: Path, after: Path) -> list[Example]:
    """Join the held-out rows with both files of answers.

    Raises:
        ValueError: the files do not belong together.
    """
    lines = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (before, after)]
    examples = []
    held_out = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    for path, answers in zip((before, after), lines, strict=True):
        if len(answers) != len(held_out):
            raise ValueError(
                f"{path}: has {len(answers)} answers, and {rows} has {len(held_out)} rows. Answer that file again."
            )
    for number, (row, first, second) in enumerate(zip(held_out, *lines, strict=True), start=1):
        name = row["conversations"][-1]["value"]
        for path, answer in ((before, first), (after, second)):
            if answer.get("reference", "").strip() != name:
                raise ValueError(
                    f"{path}:{number}: answers {answer.get('reference')!r}, and {rows} has {name!r} there. Answer that "
                    "file again."
                )
        said = [" ".join(answer["answer"].split()) for answer in (first, second)]  # on one line
        examples.append(Example(rows.parent / row["image"], name, *said))
    return examples


def spread(examples: Sequence[Example], most: int) -> list[Example]:
    """Choose examples at even distances, the first among them."""
    count = min(most, len(examples))
    return [examples[number * len(examples) // count] for number in range(count)]


def draw(path: Path, examples: Sequence[Example]) -> None:
    """Draw pictures with their name and both captions."""
    num_rows = -(-len(examples) // _COLUMNS)
    figure, grid = plt.subplots(num_rows, _COLUMNS, figsize=(3.1 * _COLUMNS, 3.3 * num_rows), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, example in zip(grid.flat, examples, strict=False):
        axes.imshow(load_image(str(example.image)).resize((128, 128)))
        text = [f"name: {example.name}", f"before: {example.before}", f"after: {example.after}"]
        wrapped = "\n".join(textwrap.shorten(line, 76, placeholder=" ...") for line in text).replace("$", r"\$")
        axes.set_title("\n".join(textwrap.fill(line, 38) for line in wrapped.split("\n")), fontsize=8, loc="left")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(_COLOURS)
    small.save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, compute, print, draw."""
    parser = argparse.ArgumentParser(description="Losses and captions before and after training a connector.")
    parser.add_argument("--runs", type=Path, nargs=2, required=True, metavar="RUN", help="untrained and trained")
    parser.add_argument("--answers", type=Path, nargs=2, required=True, metavar="FILE", help="of both, to --rows")
    parser.add_argument("--rows", type=Path, default=Path("data/real_weights/emoji/valid.jsonl"), help="held-out rows")
    parser.add_argument("--out", type=Path, required=True, help="folder for captions.json and captions.png")
    parser.add_argument("--show", type=int, default=12, help="captions to print and draw")
    options = parser.parse_args(arguments)
    try:
        examples = read_examples(options.rows, *options.answers)
        losses = [held_out_losses(run) for run in options.runs]
    except (ValueError, OSError) as error:
        sys.exit(f"captions: error: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    tree = {
        "losses": [asdict(entry) | {"gap": entry.gap} for entry in losses],
        "captions": [asdict(example) | {"image": str(example.image)} for example in examples],
    }
    (options.out / "captions.json").write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shown = spread(examples, options.show)
    draw(options.out / "captions.png", shown)
    captions = Table("name", "before", "after")
    for example in shown:
        captions.add_row(example.name, example.before, example.after)
    for part in (table_of(losses), captions):
        Console().print(part)


if __name__ == "__main__":
    main()
