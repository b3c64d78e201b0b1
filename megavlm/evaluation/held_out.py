"""The recipe's own held-out conversations, and what can be had there without looking at the image.

Beside the model's score stand two blind ones, which show what the questions give away without the image:
``blank images`` is the same model on black tiles, ``most frequent answer`` is the best constant answer to each
question text, chosen on the training data.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import overload

from megavlm.data.datasets import Dataset
from megavlm.evaluation.answer import Answer
from megavlm.evaluation.metrics import Metric
from megavlm.evaluation.question import LeftOut, Question, QuestionSet
from megavlm.recipe import Recipe


class HeldOutQuestions(Sequence[Question]):
    """Conversations of a dataset as questions; each row is read again when it is needed."""

    def __init__(self, dataset: Dataset) -> None:
        """Find the rows that ask something."""
        self._dataset = dataset
        self._rows: list[int] = []
        self.documents: list[str] = []
        """Keys of the rows that are left out: nothing is asked there."""
        for row in range(len(dataset)):
            key, conversation = dataset[row]
            if conversation.is_document:
                self.documents.append(key)
            else:
                self._rows.append(row)

    def __len__(self) -> int:
        """Usable rows of the dataset that are no documents."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Question: ...

    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...

    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        """The question of a row.

        Raises:
            ValueError: the file has changed since it was opened.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        key, conversation = self._dataset[self._rows[index]]
        return Question(key, conversation, (conversation.messages[-1].text,))


def held_out_questions(recipe: Recipe) -> QuestionSet:
    """The validation data of a recipe.

    Raises:
        ValueError: the recipe names none, it cannot be used, or it holds documents only.
    """
    if recipe.data.valid is None:
        raise ValueError("data.valid=None: there is nothing to evaluate on. Name a dataset, or give --benchmark.")
    dataset = recipe.data.valid.build()
    bad = tuple(
        LeftOut(dataset.bad_rows[number] if number < len(dataset.bad_rows) else "...", "row that cannot be used")
        for number in range(dataset.num_bad_rows)
    )
    questions = HeldOutQuestions(dataset)
    if not questions:
        raise ValueError(
            f"data.valid={recipe.data.valid.name}: all {len(dataset)} usable rows are documents: none asks."
            " The loss on them stands in the training log; name conversations to be asked, or give --benchmark."
        )
    documents = tuple(LeftOut(key, "document, where nothing is asked") for key in questions.documents)
    return QuestionSet("held-out questions", questions, bad + documents)


def baselines(
    recipe: Recipe, questions: Sequence[Question], answers: Sequence[Answer], metric: Metric
) -> dict[str, float]:
    """Scores of answers that do not look at the image.

    Args:
        recipe: names the training data.
        questions: that were asked.
        answers: to them, with and without their images.
        metric: scores them.

    Returns:
        ``blank_images`` and ``most_frequent_answer``.
    """
    frequent = _most_frequent_answers(recipe.data.train.build())
    blind = [answer.text_without_image or "" for answer in answers]
    constant = [frequent.get(question.text, "") for question in questions]
    return {
        name: metric.score([question.item(text) for question, text in zip(questions, texts, strict=True)]).value
        for name, texts in (("blank_images", blind), ("most_frequent_answer", constant))
    }


def _most_frequent_answers(dataset: Dataset) -> dict[str, str]:
    """The most frequent reference of each question text of a dataset."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in HeldOutQuestions(dataset):
        counts[question.text][question.references[0].strip()] += 1
    return {text: answers.most_common(1)[0][0] for text, answers in counts.items()}
