"""Prints what an evaluation found, and writes it as Markdown."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megavlm.evaluation.evaluate import Evaluation
from megavlm.evaluation.score import ScoredAnswer

_NUM_LISTED = 20


def print_answers(answers: Sequence[ScoredAnswer], *, most: int) -> None:
    """Print some questions with the model's answer beside the truth, evenly taken from all."""
    count = min(most, len(answers))
    if count < 1:
        return
    table = Table("question", "tiles", "model", "truth", "score", title="Some of the questions")
    for index in range(count):
        answer = answers[index * len(answers) // count]
        said = f"({answer.problem})" if answer.problem else answer.answer
        tiles = "-" if answer.num_tiles is None else str(answer.num_tiles)
        cells = (answer.question, tiles, said, " | ".join(dict.fromkeys(answer.references)), f"{answer.score:g}")
        table.add_row(*map(Text, cells))  # plain text: brackets in a question are no markup
    Console().print(table)


def score_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What is printed and written of a score: names and figures, the metric's times 100 as papers print them."""
    score = evaluation.score
    rows = [("model", f"{100 * score.value:.2f}")]
    names = {
        "blank_images": "same model, blank images",
        "most_frequent_answer": "most frequent answer to each question",
    }
    rows += [(names[name], f"{100 * value:.2f}") for name, value in evaluation.baselines.items()]
    rows += [
        (f"  {category} ({count} questions)", f"{100 * mean:.2f}")
        for category, (mean, count) in score.by_category.items()
    ]
    rows += [
        (f"  {num_tiles} tile(s), thumbnails counted ({count} questions)", f"{100 * mean:.2f}")
        for num_tiles, (mean, count) in score.by_num_tiles.items()
    ]
    counts = {
        "questions that could not be asked (counted as wrong)": score.num_unusable,
        "answers that name no option (counted as wrong)": score.num_unparsed,
        "answers cut at the most tokens": score.num_cut,
        "images with fewer tiles than chosen, to fit the sequence": score.num_degraded,
    }
    rows += [(name, str(count)) for name, count in counts.items() if count]
    reasons = Counter(row.reason for row in evaluation.left_out)
    return rows + [(f"left out, in no figure: {reason}", str(count)) for reason, count in reasons.items()]


def print_score(evaluation: Evaluation) -> None:
    """Print the score; for held-out data beside what can be had without the image."""
    kind = str(evaluation.metric["kind"]).replace("_", " ")
    table = Table(kind, "x 100", title=f"{evaluation.name}: {evaluation.score.num_questions} questions")
    for row in score_rows(evaluation):
        table.add_row(*map(Text, row))
    Console().print(table)


def write_markdown(folder: Path, evaluation: Evaluation) -> Path:
    """Write ``evaluation.md``: the same table, the settings in short, and the questions that could not be asked."""
    metric = ", ".join(f"{key} {value}" for key, value in evaluation.metric.items())
    settings = evaluation.settings
    lines = [
        f"# {evaluation.name}: {evaluation.score.num_questions} questions",
        "",
        f"- metric: {metric}",
        f"- checkpoint: {settings['checkpoint']['name']}",
        f"- data: {settings['data']}",
        f"- instruction: {settings.get('prompt_suffix') or 'none'}",
        f"- most tokens of an answer: {settings['max_new_tokens']}",
        "",
        "| | x 100 |",
        "|---|---:|",
        *(f"| {_cell(name)} | {figure} |" for name, figure in score_rows(evaluation)),
    ]
    problems = [f"- {one.key}: {one.problem}" for one in evaluation.answers if one.problem]
    if problems:
        rest = len(problems) - _NUM_LISTED
        more = [f"- and {rest} more, all of them in evaluation.json"] if rest > 0 else []
        lines += ["", "Could not be asked, and counted as wrong:", "", *problems[:_NUM_LISTED], *more]
    path = folder / "evaluation.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|")
