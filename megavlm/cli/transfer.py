"""``megavlm transfer``."""

import argparse
from pathlib import Path

from megavlm.cli.argument import add_verb
from megavlm.cli.without_cuda import restart_without_cuda
from megavlm.runtime.log import LOGGER, start_log
from megavlm.transfer import ConverterSettings, transfer

_DEFAULT = ConverterSettings()


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs, "transfer", _transfer, "take a model's vision encoder and connector to another language model"
    )
    verb.add_argument("source", type=Path, help="run folder or checkpoint of the model")
    verb.add_argument("language", type=Path, help="run folder or checkpoint with the other language model")
    verb.add_argument("target", type=Path, metavar="out", help="the run folder to make")
    verb.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="text whose tokens are paired, a caption a line (default: tokens that both vocabularies spell alike)",
    )
    verb.add_argument(
        "--loss", choices=("cosine", "mse"), default=_DEFAULT.loss, help="of the converter; mse is solved (cosine)"
    )
    verb.add_argument("--lr", type=float, default=_DEFAULT.lr, help=f"of the converter ({_DEFAULT.lr:g})")
    verb.add_argument(
        "--batch-size", type=int, default=_DEFAULT.batch_size, metavar="N", help=f"pairs ({_DEFAULT.batch_size})"
    )
    verb.add_argument(
        "--epochs", type=int, default=_DEFAULT.epochs, metavar="N", help=f"over the pairs ({_DEFAULT.epochs})"
    )
    verb.add_argument("--seed", type=int, default=_DEFAULT.seed, help=f"of the converter ({_DEFAULT.seed})")


def _transfer(options: argparse.Namespace) -> None:
    restart_without_cuda()
    start_log()
    settings = ConverterSettings(options.loss, options.lr, options.batch_size, options.epochs, options.seed)
    made = transfer(options.source, options.language, options.target, settings, captions=options.captions)
    fit = made.fit
    LOGGER.info("%s: converter merged into %s", made.checkpoint, ", ".join(made.converted))
    held_out = "none held out" if fit.held_out_cosine is None else f"{fit.held_out_cosine:.4f} of those held out"
    LOGGER.info("%d distinct pairs of tokens: mean cosine %.4f, %s", fit.num_distinct, fit.cosine, held_out)
