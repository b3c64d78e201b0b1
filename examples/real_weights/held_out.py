"""What runs take from pictures: held-out loss with the right picture and with another.

    python examples/real_weights/held_out.py RUN [RUN ...]

prints a table. Losses are in nats per token of the answers, their ends included, over the recipe's ``data.valid``. The
loss with another picture, of the file whose name ends in ``_other_image``, is what the texts give away by themselves;
what the picture adds is the gap between the two. Its error is the standard error over the batches (jackknife): a gap
below twice that is chance.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megavlm.build import Parts
from megavlm.cli.trained import find_run, loaded_run
from megavlm.data.datasets import Dataset
from megavlm.engines.feed import Feed
from megavlm.engines.step import LossSums
from megavlm.training.feeding import build_validation_loader


@dataclass(frozen=True)
class Losses:
    """Held-out losses of one run, nats per token."""

    run: str
    right_image: float
    other_image: float
    gap_error: float = 0.0
    """Standard error of the gap."""

    @property
    def gap(self) -> float:
        """What the right picture is worth."""
        return self.other_image - self.right_image


def held_out_losses(run: Path) -> Losses:
    """Compute both losses of a run over its recipe's held-out rows.

    Raises:
        ValueError: the run has no checkpoint, or its data cannot be read.
    """
    checkpoint, recipe = find_run(argparse.Namespace(folder=run, overrides=[]))
    valid = recipe.data.valid
    if valid is None:
        raise ValueError(f"{run}: its recipe has no data.valid. Give a run of a recipe that has one.")
    other = valid.model_copy(update={"path": other_image_file(valid.path)})
    with loaded_run(checkpoint, recipe) as (parts, _):
        right, wrong = (batch_losses(parts, dataset) for dataset in (valid.build(), other.build()))
    name = "/".join(part for part in run.parts[-2:] if part not in ("runs", "/", "."))
    right_mean, wrong_mean = (sum(losses, LossSums()).mean() for losses in (right, wrong))
    return Losses(name, right_mean, wrong_mean, gap_error(right, wrong))


def other_image_file(path: Path) -> Path:
    """Return the file with the same texts under other pictures."""
    return path.with_name(f"{path.stem}_other_image{path.suffix}")


def batch_losses(parts: Parts, dataset: Dataset) -> list[LossSums]:
    """Compute the loss of each batch of a data set."""
    return [parts.engine.evaluate(batches) for batches in Feed(iter(build_validation_loader(parts, dataset)))]


def gap_of(right: Sequence[LossSums], other: Sequence[LossSums]) -> float:
    """Return by how much the loss per token is higher with another picture."""
    return sum(other, LossSums()).mean() - sum(right, LossSums()).mean()


def gap_error(right: Sequence[LossSums], other: Sequence[LossSums]) -> float:
    """Return the jackknife's standard error of the gap: from how it moves as one batch after the other is left out.

    Args:
        right, other: batches of the same texts in the same order; NaN if there is one alone.
    """
    count = len(right)
    if count < 2:
        return math.nan
    kept = [[number for number in range(count) if number != left_out] for left_out in range(count)]
    gaps = [gap_of([right[number] for number in some], [other[number] for number in some]) for some in kept]
    middle = sum(gaps) / count
    return math.sqrt((count - 1) / count * sum((gap - middle) ** 2 for gap in gaps))


def table_of(losses: Sequence[Losses]) -> Table:
    """Return the losses as a table."""
    table = Table("run", "loss, right picture", "loss, another picture", "gap")
    for entry in losses:
        gap = f"{entry.gap:.3f} +- {entry.gap_error:.3f}"
        table.add_row(entry.run, f"{entry.right_image:.3f}", f"{entry.other_image:.3f}", gap)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, compute, print."""
    parser = argparse.ArgumentParser(description="Held-out losses with the right picture and with another.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    options = parser.parse_args(arguments)
    try:
        losses = [held_out_losses(run) for run in options.runs]
    except (ValueError, OSError) as error:
        sys.exit(f"held_out: error: {error}")
    Console().print(table_of(losses))


if __name__ == "__main__":
    main()
