"""Rows of few_shot.yaml and filtered.yaml: pictures in series with names made up for each, and wrong captions."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy

Row = dict[str, Any]
NAMES = "ABCDEFGH"
"""What a series calls its kinds; drawn anew for each, so that only the series itself tells."""
QUESTION = "<image>Which letter?"
NUM_SHOTS = 4


def in_series(rows: Sequence[Row], count: int, rng: numpy.random.Generator) -> list[Row]:
    """Make series of pictures of two kinds, each kind with a letter for a name: four shown, the fifth asked.

    Args:
        rows: pictures with their kinds as answers.
        count: of series.
        rng: chooses pictures and letters.
    """
    of_kind: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        of_kind[row["conversations"][-1]["value"]].append(row["image"])
    series = []
    for _ in range(count):
        kinds = rng.choice(sorted(of_kind), 2, replace=False)
        letters = rng.choice(list(NAMES), 2, replace=False)
        shown = [*rng.permutation([0, 1] * (NUM_SHOTS // 2)).tolist(), int(rng.integers(2))]
        turns, images = [], []
        for which in shown:
            images.append(str(rng.choice(of_kind[str(kinds[which])])))
            turns.append({"from": "human", "value": QUESTION})
            turns.append({"from": "gpt", "value": str(letters[which])})
        series.append({"conversations": turns, "images": images})
    return series


def with_wrong_answers(rows: Sequence[Row], rng: numpy.random.Generator) -> list[Row]:
    """Give every second picture the answer of another one, drawn at random."""
    answers = [row["conversations"][-1]["value"] for row in rows]
    noisy = []
    for number, row in enumerate(rows):
        question, answer = row["conversations"]
        told = answers[int(rng.integers(len(rows)))] if number % 2 else answer["value"]
        noisy.append({**row, "conversations": [question, {**answer, "value": told}]})
    return noisy
