"""What came of the rows of a sweep: a file of JSON lines that grows by one line for each row that ends."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.benchmark.child import RunError, TimeLimitError
from megavlm.benchmark.speed import Speed, speed_from_json

OK, REFUSED, OUT_OF_MEMORY, TIME_LIMIT, CRASHED = "ok", "refused", "out_of_memory", "time_limit", "crashed"
STATUSES = (OK, REFUSED, OUT_OF_MEMORY, TIME_LIMIT, CRASHED)
ROWS_FILE = "rows.jsonl"

# torch on CUDA; torch and Python on a CPU; a library below torch; SLURM, after the kernel killed a rank
_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|can't allocate memory|Cannot allocate memory|\bMemoryError\b|oom[-_]kill"
)
_OWN_ERROR = re.compile(r"megavlm bench speed: error: (.*)")
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]: )?([A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b.*)", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """A row that ended, well or not."""

    name: str
    layout: str
    settings: dict[str, Any]
    nodes: int
    ranks_per_node: int
    steps: int
    warmup_steps: int
    scaling: str
    status: str
    """One of :data:`STATUSES`."""
    reason: str = ""
    """Why it is not ok."""
    recipe: dict[str, Any] | None = None
    """As it was run; None: refused before."""
    row_seconds: float = 0.0
    """All of it: start, data, steps, end."""
    planned_bytes: float | None = None
    """Weights, gradients and optimizer of the rank that holds most (:func:`megavlm.planning.memory.count_memory`)."""
    speed: Speed | None = None
    """What was measured."""

    @property
    def ranks(self) -> int:
        """All ranks of the row."""
        return self.nodes * self.ranks_per_node

    @property
    def series(self) -> str:
        """What rows of the same layout and settings have in common."""
        return self.name.rpartition(",")[0]

    def per_device(self, rate: str) -> float | None:
        """A rate of :class:`Speed` by the device."""
        return None if self.speed is None else getattr(self.speed, rate) / self.ranks


def append_row(folder: Path, row: Row) -> None:
    """Add a line, and see that it is on the disk."""
    with (folder / ROWS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(folder: Path) -> dict[str, Row]:
    """Name -> the newest row of that name. A last line that was cut off by an interruption is removed from the file.

    Raises:
        ValueError: another line is not a row.
    """
    path = folder / ROWS_FILE
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data.rpartition(b"\n")[0]
    if data and not data.endswith(b"\n"):
        os.truncate(path, len(whole) + (1 if whole else 0))
    rows = {}
    for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines(), start=1):
        try:
            tree = json.loads(line)
            speed = tree.pop("speed")
            row = Row(**tree, speed=None if speed is None else speed_from_json(speed))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: line {number} is no row of this version of MegaVLM ({error}). Remove it, or choose another "
                "`save`."
            ) from None
        rows[row.name] = row
    return rows


def explain(error: RunError, output: str) -> tuple[str, str]:
    """Say why a row failed: one of :data:`STATUSES`, and the words of what failed.

    Args:
        error: how the command ended.
        output: what it printed.
    """
    if isinstance(error, TimeLimitError):
        return TIME_LIMIT, f"was ended after its time limit; it last said: {_last_line(output)}"
    lines = [line for line in output.splitlines() if _OUT_OF_MEMORY.search(line)]
    if lines:
        return OUT_OF_MEMORY, lines[0].strip()
    if own := _OWN_ERROR.search(output):
        return REFUSED, own[1]
    exceptions = _EXCEPTION.findall(output)
    # the first that is told is the cause; others fail because that rank is gone
    said = exceptions[0] if exceptions else _last_line(output)
    return CRASHED, f"exit status {error.exit_code}: {said}"


def efficiencies(rows: Sequence[Row]) -> dict[str, float]:
    """Row's name -> samples by the second and device, over those of the row of its series with the fewest ranks.

    Under weak scaling the work of a device is the same in both; under strong scaling the whole batch is.
    """
    found = {}
    good = sorted((row for row in rows if row.status == OK), key=lambda row: row.ranks)
    first: dict[str, float] = {}
    for row in good:
        rate = row.per_device("samples_per_second") or 0.0
        if first.setdefault(row.series, rate):
            found[row.name] = rate / first[row.series]
    return found


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if re.search(r"[A-Za-z0-9]", line)]
    return lines[-1] if lines else "nothing"
