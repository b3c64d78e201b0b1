"""Shows the rows of a sweep as a table."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megavlm.benchmark.breakdown import LABELS
from megavlm.benchmark.sweep_row import OK, Row, efficiencies

_TITLES = (
    "row",
    "ranks",
    "samples/s/device",
    "tokens/s/device",
    "ms a step",
    "padding",
    "MFU",
    "efficiency",
    "data wait",
    "communication",
    "peak MiB of a rank",
    "planned MiB",
)
_PRINTED = ("row", "samples/s/device", "tokens/s/device", "ms a step", "MFU", "efficiency", "communication")


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Titles, and a line for each row; a row that failed has its status and reason in place of figures."""
    efficient = efficiencies(rows)
    return [list(_TITLES), *(_line(row, efficient) for row in rows)]


def row_summary(row: Row) -> str:
    """What became of a row, on one line."""
    if row.speed is None:
        return f"{row.status}: {row.reason}"
    return (
        f"{row.per_device('samples_per_second'):.2f} samples/s and {row.per_device('tokens_per_second'):,.0f} tokens/s "
        f"a device, {1e3 * row.speed.seconds_per_step:,.0f} ms a step"
    )


def print_sweep(rows: Sequence[Row]) -> None:
    """Print the columns that a terminal has room for, and why rows failed."""
    titles, *lines = table(rows)
    places = [titles.index(title) for title in _PRINTED]
    shown = Table()
    for title in _PRINTED:
        shown.add_column(title, overflow="fold", justify="left" if title == "row" else "right")
    for row, line in zip(rows, lines, strict=True):
        shown.add_row(*(line[place] for place in places), style="" if row.status == OK else "dim")
    Console().print(shown)
    for row in rows:
        if row.status != OK:
            Console().print(f"{row.name}: {row.status}: {row.reason}", soft_wrap=True, markup=False)


def write_sweep(path: Path, rows: Sequence[Row]) -> None:
    """Write Markdown: the table, what each step goes to, the collectives, and what failed."""
    titles, *lines = table(rows)
    parts = [_markdown(titles, lines)]
    good = [row for row in rows if row.speed is not None and row.speed.detail is not None]
    if good:
        parts.append("What a step goes to, mean of the ranks:\n\n" + _markdown(["row", *LABELS], map(_shares, good)))
        peaks = sorted({row.speed.detail.peak_source for row in good if row.speed and row.speed.detail})
        parts.append("MFU: useful operations over the peak of a device. Peak: " + "; ".join(peaks) + ".")
        of_collectives = [line for row in good for line in _collectives(row)]
        if of_collectives:
            parts.append(
                _markdown(["row", "group", "ranks", "collective", "MiB", "ms", "GB/s sent by a rank"], of_collectives)
            )
    failed = [[row.name, row.status, row.reason] for row in rows if row.status != OK]
    if failed:
        parts.append(_markdown(["row", "status", "reason"], failed))
    unfinished = path.with_name(path.name + ".writing")
    unfinished.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _line(row: Row, efficient: dict[str, float]) -> list[str]:
    if row.speed is None or row.speed.detail is None:
        return [row.name, str(row.ranks), row.status, *[""] * (len(_TITLES) - 4), _mebibytes(row.planned_bytes)]
    speed, detail = row.speed, row.speed.detail
    return [
        row.name,
        str(row.ranks),
        f"{row.per_device('samples_per_second'):.2f}",
        f"{row.per_device('tokens_per_second'):,.0f}",
        f"{1e3 * speed.seconds_per_step:,.0f}",
        f"{detail.padded_share:.0%}",
        f"{detail.mfu:.1%}",
        f"{efficient[row.name]:.0%}" if row.name in efficient else "",
        f"{detail.data_wait_share:.0%}",
        f"{detail.communication_share:.0%}",
        _mebibytes(speed.peak_memory_bytes),
        _mebibytes(row.planned_bytes),
    ]


def _mebibytes(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f}"


def _shares(row: Row) -> list[str]:
    assert row.speed is not None
    assert row.speed.detail is not None
    return [row.name, *(f"{row.speed.detail.share(label):.1%}" for label in LABELS)]


def _collectives(row: Row) -> list[list[str]]:
    assert row.speed is not None
    assert row.speed.detail is not None
    return [
        [
            row.name,
            one.group,
            str(one.group_size),
            one.name,
            f"{one.num_bytes / 2**20:,.0f}",
            f"{1e3 * one.seconds:,.1f}",
            f"{one.bus_bytes_per_second / 1e9:.2f}",
        ]
        for one in row.speed.detail.collectives
    ]


def _markdown(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(_cell(word) for word in row) + " |" for row in rows)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
