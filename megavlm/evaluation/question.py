"""A question of an evaluation, wherever it came from, and the questions of one evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.data import Conversation
from megavlm.evaluation.metrics import Item


@dataclass(frozen=True)
class Question:
    """What is asked, and what counts as right."""

    key: str
    """Names the question in results and errors; no two questions of an evaluation share it."""
    conversation: Conversation
    """Ends with the user's question, or with the answer, which the model does not see."""
    references: tuple[str, ...]
    """The right answers, as the metric wants them."""
    choices: tuple[str, ...] = ()
    """Texts of the options A, B, C, ..."""
    category: str = ""
    """Kind of question, as its benchmark names it."""

    @property
    def text(self) -> str:
        """The last user turn without its images."""
        return [message for message in self.conversation.messages if message.role == "user"][-1].text.strip()

    @property
    def images(self) -> list[str]:
        """Where its images are."""
        return [image.source for image in self.conversation.images]

    def item(self, prediction: str) -> Item:
        """The question with an answer, for a metric.

        Raises:
            ValueError: no reference says anything.
        """
        return Item(self.key, prediction, self.references, self.choices, self.category)


@dataclass(frozen=True)
class LeftOut:
    """A row of a benchmark that is not asked, because it cannot be scored the way the benchmark does."""

    key: str
    reason: str
    """The same words for all rows of one kind, so that they can be counted."""


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one evaluation."""

    name: str
    """For titles."""
    questions: Sequence[Question]
    left_out: tuple[LeftOut, ...] = ()
    """In none of the figures but their own."""
