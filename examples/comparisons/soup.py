"""Mix the models of soup.yaml greedily, seed by seed, and compare the soup with the best of them.

    python examples/comparisons/soup.py runs/comparisons/soup

Calls `megavlm soup` and `megavlm eval`. What goes in is chosen on one half of the held-out questions (``select``), and
everything is measured on the other half (``test``): on the half that it was chosen on, a greedy soup cannot lose.
Soups that are there already are not made again.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SELECT = "data.valid.path=data/comparisons/coarse_select.jsonl"
MEGAVLM = [sys.executable, "-m", "megavlm"]


def run(*arguments: object) -> None:
    """Run a command of megavlm.

    Raises:
        ValueError: it failed.
    """
    command = [*MEGAVLM, *map(str, arguments)]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"{shlex.join(command)}: failed; what it says stands above.")


def mix(members: Sequence[Path], target: Path) -> None:
    """Make a greedy soup of run folders and measure it, unless it is there."""
    if not target.exists():
        command = shlex.join([*MEGAVLM, "eval", "{folder}", SELECT, "--output", "{folder}/select", "--show", "1"])
        options = ("--method", "greedy", "--score-command", command, "--score-file", "select/evaluation.json")
        run("soup", target, *members, *options)
    if not (target / "evaluation.json").exists():
        run("eval", target, "--show", "1")


def reached(folder: Path) -> float:
    """What a run folder's evaluation came to."""
    return float(json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["score"]["exact_match"])


def table(save: Path, seeds: Sequence[str], variants: Sequence[str]) -> str:
    """Markdown: of each seed the members, the one that is best on ``select``, and the soup, on ``test``."""
    lines = [
        "| seed | " + " | ".join(variants) + " | best by select | soup | members |",
        "|---" * (len(variants) + 4) + "|",
    ]
    for seed in seeds:
        report = json.loads((save / f"soup-{seed}" / "soup.json").read_text(encoding="utf-8"))
        scores = [reached(save / variant / seed / "soup_member") for variant in variants]
        best = max(zip(scores, report["models"], strict=True), key=lambda pair: pair[1]["score"])[0]
        cells = [f"{score:.1%}" for score in (*scores, best, reached(save / f"soup-{seed}"))]
        lines.append(f"| {seed} | {' | '.join(cells)} | {len(report['order'])} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, mix and print."""
    parser = argparse.ArgumentParser(description="Mix the models of soup.yaml.")
    parser.add_argument("save", type=Path, help="folder of the comparison")
    save = parser.parse_args(arguments).save
    try:
        if not (save / "results.json").is_file():
            raise ValueError(f"save={save}: holds no comparison. Run `megavlm bench compare` on soup.yaml first.")
        runs = json.loads((save / "results.json").read_text(encoding="utf-8"))["runs"]
        variants = list(dict.fromkeys(run["variant"] for run in runs))
        seeds = list(dict.fromkeys(f"seed{run['seed']}" for run in runs))
        for seed in seeds:
            mix([save / variant / seed / "soup_member" for variant in variants], save / f"soup-{seed}")
    except ValueError as error:
        sys.exit(f"soup: error: {error}")
    told = table(save, seeds, variants)
    (save / "soup.md").write_text(told, encoding="utf-8")
    print(told)


if __name__ == "__main__":
    main()
