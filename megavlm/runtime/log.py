"""What a run says: plain text lines on stdout and in a file, from rank 0, and each warning once.

Other ranks are heard only when something is wrong (errors, and warnings sent with ``any_rank=True``); their lines carry
their rank. Imports nothing of the project.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

LOGGER = logging.getLogger("megavlm")
"""The project's logger. Modules use ``LOGGER.info(...)`` directly, or a child of it."""

# Said by other packages at import or at every step, and of no use to a person who runs this program. `megavlm doctor`
# tells what is missing and what it costs.
_NOISE = (
    r"Transformer Engine and Apex are not installed",  # megatron.core.optimizer, at import
    r"Apex is not installed\. Falling back to Torch Norm",  # megatron.core.models, at import
    r"full scope is deprecated",  # TransformerConfig, of a CUDA graph field that nobody set
    r"The \.grad attribute of a Tensor that is not a leaf",  # megatron-core's optimizer looks at its shards
    r"When using (async grad allreduce|sequence parallelism) it is recommended",  # set where it matters, on CUDA
    r"`load_state_dict` is deprecated",  # of torch.distributed.checkpoint, which megatron-core calls
    r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",  # what megatron-core calls
)

_warned: set[str] = set()


class _RankFilter(logging.Filter):
    """Lets everything of rank 0 pass; of other ranks errors, and what is marked ``any_rank``."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.from_rank = f"[rank {self._rank}] " if self._rank else ""
        return self._rank == 0 or record.levelno >= logging.ERROR or getattr(record, "any_rank", False)


class _StdoutHandler(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stdout`` is at the moment: a progress bar puts itself there and prints lines above it."""

    @property
    def stream(self) -> TextIO:
        """Where the next line goes."""
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass  # the base class sets it once


class _FileHandler(logging.FileHandler):
    """Writes to a file; where that fails (a full disk) it says so once, not with a traceback for each line."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """Tell the first failure on stderr. The lines are on stdout all the same."""
        if not self.has_failed:
            self.has_failed = True
            error = sys.exc_info()[1]
            print(f"{self.baseFilename}: lines of the log cannot be written: {error}", file=sys.stderr)


def start_log(rank: int | None = None, file: Path | None = None, level: int = logging.INFO) -> logging.Logger:
    """Send the project's log to stdout and, if given, to a file (appended to, so a resumed run goes on in it).

    Calling it again replaces the outputs of the call before.

    Args:
        rank: of this process; default the ``RANK`` of torchrun, or 0.
        file: made with its folders. Every rank may name the same one: lines of other ranks are errors only.
        level: least level that is shown.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    stop_log()
    handlers: list[logging.Handler] = [_StdoutHandler()]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_FileHandler(file, encoding="utf-8", delay=True))
    for handler in handlers:
        handler.addFilter(_RankFilter(rank))
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(from_rank)s%(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    return LOGGER


def stop_log() -> None:
    """Close the outputs that :func:`start_log` opened, and forget which warnings were given."""
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    LOGGER.propagate = True
    _warned.clear()


def warn_once(message: str, *, any_rank: bool = False) -> bool:
    """Log a warning the first time this text is given in this process.

    Args:
        message: the text, which is also what "the same warning" means.
        any_rank: say it on ranks other than 0 too, for what only one rank can know.

    Returns:
        Whether it was said.
    """
    if message in _warned:
        return False
    _warned.add(message)
    LOGGER.warning("warning: %s", message, extra={"any_rank": any_rank})
    return True


def quiet_third_parties() -> None:
    """Silence the known noise of other packages; what is not listed above is still shown."""
    for text in _NOISE:
        warnings.filterwarnings("ignore", message=text)
