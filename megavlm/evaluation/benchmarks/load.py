"""Loads a benchmark by its name: checks which files it takes, and that its questions can be told apart."""

from collections import Counter
from pathlib import Path

from megavlm.evaluation.benchmarks import BENCHMARKS, BenchmarkFiles
from megavlm.evaluation.question import LeftOut, Question, QuestionSet


def load_benchmark(kind: str, files: BenchmarkFiles, instruction: str | None = None) -> QuestionSet:
    """Read the questions of a benchmark. Images are not looked at.

    Args:
        kind: a key of :data:`BENCHMARKS`.
        files: where it lies.
        instruction: put behind each question; None: the benchmark's usual one; empty: none.

    Raises:
        ValueError: a file is missing, of no use to this kind, or malformed; or there is no question in it.
    """
    benchmark = BENCHMARKS[kind]
    if (files.annotations is not None) != benchmark.takes_annotations:
        needs = "needs a file of answers; give one" if benchmark.takes_annotations else "takes none; leave it out"
        raise ValueError(f"--annotations={files.annotations}: --benchmark {kind} {needs}.")
    if files.split is not None and not benchmark.takes_split:
        raise ValueError(f"--split={files.split}: has no meaning for --benchmark {kind}, whose splits are files.")
    rows = list(benchmark.read(files, benchmark.instruction if instruction is None else instruction))
    questions = [row for row in rows if isinstance(row, Question)]
    left_out = tuple(row for row in rows if isinstance(row, LeftOut))
    if not questions:
        of_split = f" of split {files.split}" if files.split else ""
        raise ValueError(f"--data={files.data}: has 0 questions{of_split} to ask, {len(left_out)} left out.")
    key, count = Counter(row.key for row in rows).most_common(1)[0]
    if count > 1:
        raise ValueError(f"--data={files.data}: {count} questions have the name {key!r}, names must be different.")
    return QuestionSet(f"{kind} ({Path(files.data).name})", questions, left_out)
