"""The receipt itself: as data, as JSON, as a page of Markdown, and as tables in the terminal."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megavlm.checkpoint import durable
from megavlm.convert.receipt.output import MAX_KL, MAX_RELATIVE_DIFFERENCE, NUM_NEW_TOKENS, OutputRow
from megavlm.convert.receipt.probe import PICTURES
from megavlm.convert.receipt.tensor import TensorRow, Unmapped, sum_layers
from megavlm.convert.receipt.theirs import Reload

JSON_NAME, PAGE_NAME = "receipt.json", "receipt.md"
_MOST_NAMED = 8
LIMITS = (
    "tensors: equal bit by bit, after rounding to the target's type where the conversion was asked to change it",
    "names: each has a counterpart, or a reason to have none",
    "loading: transformers finds nothing missing, unexpected or of another shape",
    f"outputs, both sides in float32 from the same values: relative difference <= {MAX_RELATIVE_DIFFERENCE:g}, KL "
    f"divergence <= {MAX_KL:g} nats at every position, the same {NUM_NEW_TOKENS} greedy tokens",
)
_LAYER_TITLES = ("layer", "tensors", "bit-equal", "max diff", "relative")
_OUTPUT_TITLES = ("input", "length", "max diff", "relative", "KL mean", "KL max", "greedy")


@dataclass(frozen=True)
class Receipt:
    """What was compared, and what came of it."""

    source: Path
    target: Path
    direction: str
    architecture: str
    parts: tuple[str, ...]
    tensors: list[TensorRow]
    unmapped: list[Unmapped]
    reload: Reload | None
    """None where ``transformers`` could not be asked."""
    outputs: list[OutputRow]
    not_compared: list[str]
    """What was left out, and why."""
    faults: list[str]
    """What did not hold."""

    @property
    def verdict(self) -> str:
        """In one line."""
        if self.faults:
            return f"does not hold: {shorten(self.faults)}"
        outputs = self.outputs[0].kind if self.outputs else ""
        what = " and ".join(["tensors", outputs] if outputs else ["tensors"])
        left_out = f"; {'; '.join(self.not_compared)}" if self.not_compared else ""
        return f"holds, for {what}{left_out}"

    def require(self) -> None:
        """Refuse what does not hold.

        Raises:
            ValueError: something does not; one line that names it.
        """
        if self.faults:
            raise ValueError(
                f"target={self.target}: the receipt does not hold: {shorten(self.faults)}. Read "
                f"{self.target / PAGE_NAME}, and convert again."
            )

    def write(self) -> None:
        """Put both files into the target folder, in place of older ones.

        Raises:
            ValueError: it may not be written.
        """
        try:
            durable.replace_file(self.target / JSON_NAME, (json.dumps(self.tree(), indent=1) + "\n").encode())
            durable.replace_file(self.target / PAGE_NAME, self.page().encode())
        except OSError as error:
            raise ValueError(
                f"target={self.target}: the receipt cannot be written ({error.strerror}). Make room, or its folder "
                "writable."
            ) from None

    def tree(self) -> dict[str, Any]:
        """As plain values. Numbers that JSON does not know are texts."""
        tree = asdict(self) | {
            "holds": not self.faults,
            "verdict": self.verdict,
            "limits": LIMITS,
            "layers": [asdict(row) for row in sum_layers(self.tensors)],
        }
        return {"holds": tree.pop("holds"), "verdict": tree.pop("verdict"), **_plain(tree)}

    def page(self) -> str:
        """As Markdown: the tensors summed up by layer, those that differ by name."""
        lines = [
            "# Receipt of a conversion",
            "",
            f"**{self.verdict}**",
            "",
            f"- {self.direction}: `{self.source}` to `{self.target}`",
            f"- {self.architecture}: {', '.join(self.parts)}",
        ]
        if self.reload is not None:
            versions = ", ".join(f"{name} {version}" for name, version in self.reload.versions.items())
            lines += [
                f"- loaded by {self.reload.class_name} ({versions}) in a process of its own",
                f"- pictures: {', '.join(PICTURES)} of matplotlib, each as one tile (or, where cross-attention reads "
                "tiles, as two and a thumbnail)",
            ]
        lines += ["", "## Limits", "", *(f"- {limit}" for limit in LIMITS)]
        lines += _section("What does not hold", [f"- {fault}" for fault in self.faults])
        lines += _section("Not compared", [f"- {reason}" for reason in self.not_compared])
        lines += _section("Outputs", _markdown_table(_OUTPUT_TITLES, self._output_cells()) if self.outputs else [])
        lines += _section("Tensors", _markdown_table(_LAYER_TITLES, self._layer_cells()))
        notes = [f"- `{row.key}` ({', '.join(row.names)}): {row.note}" for row in self.tensors if row.note]
        lines += _section("Notes on tensors", notes)
        lines += _section("Names without a counterpart", self._unmapped_lines())
        return "\n".join(lines) + f"\n\nEvery tensor by name: `{JSON_NAME}`.\n"

    def print(self) -> None:
        """Show the tables in the terminal."""
        console = Console()
        for title, titles, rows in (
            ("Tensors", _LAYER_TITLES, self._layer_cells()),
            ("Outputs", _OUTPUT_TITLES, self._output_cells()),
        ):
            if rows:
                table = Table(title=title)
                for name in titles:
                    table.add_column(name, overflow="fold", no_wrap=name == titles[0])
                for row in rows:
                    table.add_row(*row)
                console.print(table)
        for line in self._unmapped_lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(f"receipt: {self.verdict}", markup=False, highlight=False, soft_wrap=True)

    def _layer_cells(self) -> list[list[str]]:
        return [
            [row.layer, str(row.num_tensors), str(row.num_bit_equal), _number(row.max_abs), _number(row.max_rel)]
            for row in sum_layers(self.tensors)
        ]

    def _output_cells(self) -> list[list[str]]:
        return [
            [
                row.name,
                str(row.num_positions),
                _number(row.max_abs),
                _number(row.max_rel),
                _number(row.mean_kl),
                _number(row.max_kl),
                ("equal" if row.theirs == row.ours else "differ") if row.theirs else "",
            ]
            for row in self.outputs
        ]

    def _unmapped_lines(self) -> list[str]:
        """Names without counterpart, together where the reason is the same."""
        groups: dict[tuple[str, str], list[str]] = {}
        for one in self.unmapped:
            groups.setdefault((one.side, one.reason), []).append(one.name)
        return [f"- {side}, {reason}: {_named(names)}" for (side, reason), names in groups.items()]


def shorten(faults: Sequence[str]) -> str:
    """The first of some sentences, and how many more there are."""
    return faults[0] + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "")


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown}, ... ({len(names)} in all)"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
