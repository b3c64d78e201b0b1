"""Shows that training survives faults: real jobs of ``slurm/nvlm_d.sh`` on a real SLURM of this machine.

    python tools/fault_campaign.py --out runs/faults                      three rounds of every fault
    python tools/fault_campaign.py --out runs/faults --faults kill_rank,full_disk --rounds 5 --seed 7

Each round starts a cluster of two nodes (``tools/local_slurm.sh``), submits the tiny NVLM-D on two ranks, waits for a
random moment, makes the fault, waits for the end of the job and of all its restarts, and compares the run with one that
nothing disturbed: the curve, and the tensors of the last checkpoint, must be the same bit for bit. Moments and victims
come from ``--seed``, the fault and the round.

``--out`` gets ``rounds.jsonl`` (a line for each round), ``table.md`` and a folder for each round. Rounds that are in
``rounds.jsonl`` are not run again. The data of the quickstart is built there if ``--data`` does not name it.

Exit status: 0 every round was survived, 1 one was not, 2 wrong usage, 3 SLURM is not installed. docs/RELIABILITY.md has
what came out.
"""

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from fault_campaign_cluster import REPOSITORY, Cluster, check_installed
from fault_campaign_faults import AROUND, FAULTS
from fault_campaign_judge import (
    Outcome,
    Point,
    append_outcome,
    compare_curves,
    read_curve,
    read_outcomes,
    table,
    weights_of,
)
from fault_campaign_round import NotWithinError, Round, Settings

ROUNDS_FILE = "rounds.jsonl"


def main() -> None:
    """Run the campaign that the command line asks for."""
    options = parse()
    check_installed()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = options.data.resolve() if options.data else build_data(out)
    settings = Settings(data, options.steps, options.save_interval, options.patience, options.lost_seconds)
    reference = reference_of(out / "reference", settings)
    file = out / ROUNDS_FILE
    expected = {name: fault.expected for name, fault in FAULTS.items()}
    for round_number in range(options.rounds):
        for name in options.faults:
            if any(done.fault == name and done.round == round_number for done in read_outcomes(file)):
                continue
            outcome = play(out, name, round_number, options.seed, settings, reference)
            append_outcome(file, outcome)
            verdict = "survived" if outcome.survived else f"NOT survived: {'; '.join(outcome.problems)}"
            print(
                f"{name}, round {round_number + 1} ({outcome.moment}): {verdict} ({outcome.seconds:.0f} s)", flush=True
            )
            (out / "table.md").write_text(table(read_outcomes(file), expected), encoding="utf-8")
    outcomes = [done for done in read_outcomes(file) if done.fault in options.faults]
    print(table(outcomes, expected), end="")
    sys.exit(0 if all(outcome.survived for outcome in outcomes) else 1)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; wrong values leave the program with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the campaign; one that was begun goes on")
    parser.add_argument("--faults", default="all", help=f"all, or some of {', '.join(FAULTS)}")
    parser.add_argument("--rounds", type=int, default=3, help="of each fault (default 3)")
    parser.add_argument("--seed", type=int, default=1, help="of moments and victims (default 1)")
    parser.add_argument("--data", type=Path, help="the quickstart's data, if it is there already")
    parser.add_argument("--steps", type=int, default=40, help="of a run (default 40)")
    parser.add_argument("--save-interval", type=int, default=4, help="steps between checkpoints (default 4)")
    parser.add_argument("--lost-seconds", type=float, default=15.0, help="engine.lost_timeout_seconds (default 15)")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds to wait for any one thing (default 600)")
    options = parser.parse_args(arguments)
    names = list(FAULTS) if options.faults == "all" else options.faults.split(",")
    if unknown := sorted(set(names) - FAULTS.keys()):
        parser.error(f"--faults {options.faults}: {unknown[0]!r} is not a fault. Known: all, {', '.join(FAULTS)}.")
    options.faults = [name for name in FAULTS if name in names]
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1.")
    if options.save_interval < 1 or options.steps < 6 * options.save_interval:
        parser.error(
            f"--steps {options.steps}: must be at least 6 times --save-interval {options.save_interval}, so that there "
            "are checkpoints before and after every fault."
        )
    return options


def build_data(out: Path) -> Path:
    """Build the quickstart's data in the campaign's folder, unless it is there."""
    data = out / "data"
    if not data.exists():
        script = REPOSITORY / "examples" / "quickstart" / "build_data.py"
        subprocess.run([sys.executable, str(script), "--out", str(data)], check=True)
    return data


def reference_of(folder: Path, settings: Settings) -> tuple[list[Point], dict[str, str]]:
    """The curve of a job that nothing disturbs, and the sums of its last tensors; run if it is not there.

    Raises:
        SystemExit: one is there of other settings, or the run failed.
    """
    file, wanted = folder / "settings.json", settings.overrides(folder / "run")
    if file.exists() and json.loads(file.read_text()) != wanted:
        sys.exit(f"fault_campaign: {folder}: is of a campaign with other settings. Choose another --out.")
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        outcome = Outcome("reference", 0, 0)
        with Cluster(folder / "slurm") as cluster:
            this = Round(outcome, settings, cluster, folder)
            job = this.submit()
            if (state := this.wait_end()) != "COMPLETED":
                sys.exit(f"fault_campaign: the run that nothing disturbs ended as {state}:\n{job.output[-3000:]}")
        file.write_text(json.dumps(wanted))
    curve = read_curve(folder / "run" / "metrics.jsonl")
    whole = [(step, *point[1:]) for step, point in zip(range(1, settings.steps + 1), curve, strict=False)]
    if problem := compare_curves(curve, whole):
        sys.exit(f"fault_campaign: {folder}: {problem}. Remove it.")
    return curve, weights_of(folder / "run", settings.steps)


def play(
    out: Path,
    name: str,
    round_number: int,
    seed: int,
    settings: Settings,
    reference: tuple[list[Point], dict[str, str]],
) -> Outcome:
    """Play one round; whatever happens, its cluster ends."""
    fault = FAULTS[name]
    outcome = Outcome(name, round_number, seed, expected=fault.expected)
    folder = out / f"{name}_{round_number + 1}"
    if (folder / "run").is_mount():  # of a campaign that was killed
        subprocess.run(["umount", "-l", str(folder / "run")], check=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    started = time.monotonic()
    with Cluster(folder / "slurm") as cluster:
        this = Round(outcome, settings, cluster, folder)
        around = AROUND.get(name)
        try:
            with around(this) if around else contextlib.nullcontext():
                fault.play(this, fault.moments[round_number % len(fault.moments)])
                this.check_end(*reference)
        except (NotWithinError, PermissionError, RuntimeError, OSError, subprocess.SubprocessError) as error:
            outcome.problems.append(f"{type(error).__name__}: {error}")
            with contextlib.suppress(RuntimeError, subprocess.SubprocessError):
                outcome.end = this.job.state if this.jobs else ""
    outcome.seconds = round(time.monotonic() - started, 1)
    if outcome.survived:
        this.clean()
    return outcome


def _leave(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that the cluster is ended."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
