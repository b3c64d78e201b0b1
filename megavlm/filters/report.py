"""What a filter did, as numbers and as a picture: the scores of all samples, and some that were kept and dropped."""

import json
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from megavlm.checkpoint import durable
from megavlm.data import Conversation, Dataset
from megavlm.data.image import ImageError, load_image

matplotlib.use("Agg")  # no screen on a cluster

REPORT_NAME = "report.json"
PICTURE_NAME = "report.png"

_NUM_EXAMPLES = 6
_NUM_BINS = 40
_THUMBNAIL = (160, 160)
_MOST_CHARACTERS = 110

Group = tuple[str, str, list[int]]
"""Name, colour and numbers of samples."""


def write_report(
    folder: Path,
    dataset: Dataset,
    scores: Mapping[int, Mapping[str, Any]],
    kept: set[int],
    *,
    what: str,
    is_logarithmic: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write ``report.json`` and ``report.png``.

    Args:
        folder: where to.
        dataset: that was filtered.
        scores: ``score`` or ``problem`` of every sample, by number.
        kept: numbers of those that are kept.
        what: what the score is.
        is_logarithmic: whether the picture's axis of scores is.
        extra: goes into ``report.json``.
    """
    usable = {number: float(entry["score"]) for number, entry in scores.items() if entry.get("score") is not None}
    problems = Counter(str(entry["problem"]).partition(":")[0] for entry in scores.values() if entry.get("problem"))
    tree = {
        "score": what,
        "num_samples": len(scores),
        "num_kept": len(kept),
        "num_dropped": len(usable.keys() - kept),
        "num_without_score": len(scores) - len(usable),
        "reasons": dict(problems.most_common()),
        "num_bad_rows": dataset.num_bad_rows,
        **(extra or {}),
    }
    durable.replace_file(folder / REPORT_NAME, (json.dumps(tree, indent=1) + "\n").encode())
    groups = [
        ("kept", "tab:green", [number for number in usable if number in kept]),
        ("dropped", "tab:red", [number for number in usable if number not in kept]),
    ]
    figure = plt.figure(figsize=(2.1 * _NUM_EXAMPLES, 9.2), layout="constrained")
    top, *rows = figure.subfigures(3, 1, squeeze=False)[:, 0]
    _draw_histogram(top.subplots(), groups, usable, what, is_logarithmic)
    for part, group in zip(rows, groups, strict=True):
        part.suptitle(f"{group[0]}: {len(group[2])}; some of them, by score", color=group[1], fontsize=10)
        panels = part.subplots(1, _NUM_EXAMPLES)
        for axes in panels:
            axes.axis("off")
        for axes, number in zip(panels, _spread(group[2], usable), strict=False):
            _draw_example(axes, dataset, number, usable[number])
    figure.savefig(folder / PICTURE_NAME, dpi=80)
    plt.close(figure)


def _spread(numbers: Sequence[int], scores: Mapping[int, float]) -> list[int]:
    """Some of the numbers, at even distances in the order of their scores."""
    ordered = sorted(numbers, key=lambda number: (scores[number], number))
    return list(
        dict.fromkeys(ordered[place * len(ordered) // _NUM_EXAMPLES] for place in range(_NUM_EXAMPLES) if ordered)
    )


def _draw_histogram(
    axes: Axes, groups: Sequence[Group], scores: Mapping[int, float], what: str, is_logarithmic: bool
) -> None:
    axes.set_xlabel(what)
    axes.set_ylabel("samples")
    if not scores:
        axes.set_title("no scores")
        return
    low, high = min(scores.values()), max(scores.values())
    is_logarithmic = is_logarithmic and 0 < low < high
    if low == high:
        low, high = low - 0.5, high + 0.5
    steps = [place / _NUM_BINS for place in range(_NUM_BINS + 1)]
    edges = [low * math.pow(high / low, step) if is_logarithmic else low + (high - low) * step for step in steps]
    axes.hist(
        [[scores[number] for number in numbers] for _, _, numbers in groups],
        bins=edges,
        stacked=True,
        color=[colour for _, colour, _ in groups],
        label=[f"{name} ({len(numbers)})" for name, _, numbers in groups],
    )
    if is_logarithmic:
        axes.set_xscale("log")
    axes.legend(fontsize=8)


def _draw_example(axes: Axes, dataset: Dataset, number: int, score: float) -> None:
    try:
        _, conversation = dataset[number]
    except ValueError:
        return  # the file was changed meanwhile
    for reference in conversation.images[:1]:
        try:
            image = load_image(reference.source)
        except ImageError:
            continue
        image.thumbnail(_THUMBNAIL)
        axes.imshow(image)
    text = textwrap.shorten(learnt_text(conversation), _MOST_CHARACTERS, placeholder=" ...")
    axes.set_title(textwrap.fill(f"{score:.4g}: {text}", 28).replace("$", r"\$"), fontsize=7, loc="left")


def learnt_text(conversation: Conversation) -> str:
    """What the assistant says in a conversation, or the text of a document."""
    return "\n".join(message.text for message in conversation.messages if message.role == "assistant")
