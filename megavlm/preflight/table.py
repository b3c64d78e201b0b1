"""What ``megavlm preflight`` prints: a row for each node, then each failure in words."""

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from megavlm.preflight.collective import Measured
from megavlm.preflight.fact import Facts
from megavlm.preflight.verdict import Failure, clock_offsets, expected_node, name_ranks

_WIDTH = 120  # where there is no terminal: job logs
_CHECKS = ("versions", "device", "run folder", "data")


def print_table(
    facts: Mapping[int, Facts], measured: Mapping[int, Measured], failures: Sequence[Failure], world_size: int
) -> None:
    """Print what was found.

    Args:
        facts: of the ranks that answered.
        measured: what they saw of each other; empty if it did not come to that.
        failures: what they mean.
        world_size: ranks that there should be.
    """
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    ranks_of: dict[str, list[int]] = {}
    for rank in range(world_size):
        node = facts[rank].node if rank in facts else expected_node(rank, world_size)
        ranks_of.setdefault(node, []).append(rank)
    offsets = clock_offsets(measured)
    table = Table("node", "ranks", *_CHECKS, "clock", "collectives", title=f"Preflight of {world_size} rank(s)")
    for node, ranks in ranks_of.items():
        failed = {failure.check for failure in failures if failure.node == node}
        cells = [_cell(check, failed, any(rank in facts for rank in ranks)) for check in _CHECKS]
        present = [facts[rank] for rank in ranks if rank in facts]
        if present and "device" not in failed:
            cells[1] = present[0].device
        clock = max((offsets[rank] for rank in ranks if rank in offsets), key=abs, default=None)
        together = failed & {"collectives", "all-reduce", "all-gather"}
        cells.append("-" if clock is None else f"{clock * 1000.0:+.1f} ms")
        cells.append("FAILED" if together else "ok" if offsets else "-")
        table.add_row(node, name_ranks(ranks).split(" ", 1)[1], *cells)
    console.print(table)
    if facts:
        print(", ".join(f"{name} {version}" for name, version in facts[min(facts)].versions.items()))
    if world_size > 1 and (seen := measured.get(0)) and seen.all_reduce_seconds:
        plain, per_rank = seen.bandwidth(world_size)
        print(
            f"all-gather and all-reduce give the right numbers; all-reduce of {seen.num_bytes / 2**20:.0f} MiB:"
            f" {seen.all_reduce_seconds * 1000.0:.1f} ms, {plain / 1e9:.2f} GB/s ({per_rank / 1e9:.2f} GB/s sent by"
            " each rank)"
        )
    for failure in failures:
        print(f"preflight: FAILED: {failure}")
    if not failures:
        print(f"preflight: all {world_size} rank(s) on {len(ranks_of)} node(s) are ready")
    sys.stdout.flush()


def _cell(check: str, failed: set[str], is_present: bool) -> str:
    if check in failed:
        return "FAILED"
    return "ok" if is_present else "-"
