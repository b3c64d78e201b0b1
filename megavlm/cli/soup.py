"""``megavlm soup``."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megavlm.cli.argument import add_verb
from megavlm.cli.without_cuda import environment_before, restart_without_cuda
from megavlm.runtime.log import start_log
from megavlm.soup import METHODS, ScoreSettings, SoupSettings, make_soup
from megavlm.soup.make import table_rows
from megavlm.soup.score import EVALUATION_NAME


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "soup", _soup, "mix several models of one architecture into one")
    verb.add_argument("target", type=Path, metavar="out", help="the run folder to make")
    verb.add_argument("runs", type=Path, nargs="+", help="run folders or checkpoints")
    told = "; ".join(f"{name}: {text}" for name, text in METHODS.items())
    verb.add_argument("--method", choices=tuple(METHODS), default="average", help=f"{told} (average)")
    verb.add_argument("--weights", type=_numbers, metavar="A,B,...", help="of the models, for average (all alike)")
    verb.add_argument("--top", type=int, metavar="P", help="models that maximum takes")
    verb.add_argument(
        "--score-command",
        metavar="COMMAND",
        help="scores a model whose run folder stands for {folder}: the number in its last line, or what it left in "
        "--score-file; default: scores are read from there",
    )
    verb.add_argument(
        "--score-file",
        default=EVALUATION_NAME,
        metavar="FILE",
        help=f"results of megavlm eval in each run folder, {{checkpoint}} being the checkpoint's name "
        f"({EVALUATION_NAME})",
    )
    verb.add_argument("--lower-is-better", action="store_true", help="of the scores, as of a loss")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, as 1,1,2") from None


def _soup(options: argparse.Namespace) -> None:
    restart_without_cuda()
    start_log()
    score = ScoreSettings(options.score_command, options.score_file, options.lower_is_better, environment_before())
    soup = make_soup(options.runs, options.target, SoupSettings(options.method, options.weights, options.top, score))
    table = Table("model", "score", "share", title=f"{options.method} soup: {soup.checkpoint}")
    for name, reached, share in table_rows(soup):
        table.add_row(Text(name), "not measured" if reached is None else f"{reached:.6g}", f"{share:.3f}")
    Console().print(table)
