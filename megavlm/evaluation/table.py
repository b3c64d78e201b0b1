"""Prints what an evaluation found."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megavlm.evaluation.exact_match import Answer, Score


def print_answers(answers: Sequence[Answer], *, most: int) -> None:
    """Print some questions with the model's answer beside the truth, evenly taken from all."""
    count = min(most, len(answers))
    if not count:
        return
    table = Table("question", "tiles", "model", "truth", "", title="Held-out questions")
    for index in range(count):
        answer = answers[index * len(answers) // count]
        mark = "right" if answer.is_right else "WRONG"
        table.add_row(answer.question, str(answer.num_tiles), answer.answer, answer.reference, mark)
    Console().print(table)


def print_score(score: Score) -> None:
    """Print the score beside what can be had without the image."""
    table = Table("exact match", "share", title=f"{score.num_questions} held-out questions")
    table.add_row("model", f"{score.exact_match:.1%}")
    table.add_row("same model, blank images", f"{score.blank_images:.1%}")
    table.add_row("most frequent answer to each question", f"{score.most_frequent_answer:.1%}")
    for num_tiles, (share, count) in score.by_num_tiles.items():
        table.add_row(f"  {num_tiles} tile(s), thumbnail counted ({count} questions)", f"{share:.1%}")
    if score.num_unusable:
        table.add_row("rows that gave no question", str(score.num_unusable))
    Console().print(table)
