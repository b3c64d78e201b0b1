"""Worked examples before a question, as one conversation or one document."""

from collections.abc import Sequence
from dataclasses import replace

from megavlm.data.conversation import Conversation, Message


def few_shot(shots: Sequence[Conversation], query: Conversation, separator: str = "\n\n") -> Conversation:
    """Put examples before what is asked.

    Conversations become earlier turns, whose answers are not learnt: training, a prompt and its reference answer are
    those of ``query``. Documents are joined into one, as interleaved data is.

    Args:
        shots: the examples, in the order in which they are read. Their system messages are left out.
        query: what is asked; its system message, if any, comes first.
        separator: what stands between documents.

    Raises:
        ValueError: documents and conversations are mixed, or an example of turns ends without an answer.
    """
    if any(shot.is_document != query.is_document for shot in shots):
        raise ValueError(
            "shots: documents and conversations are mixed with the query's kind. Give examples that are all like it."
        )
    if query.is_document:
        parts = [part for shot in shots for part in (*shot.messages[0].parts, separator)]
        return Conversation((Message("assistant", (*parts, *query.messages[0].parts)),), is_document=True)
    system = [message for message in query.messages if message.role == "system"]
    messages = []
    for number, shot in enumerate(shots):
        if shot.messages[-1].role != "assistant":
            raise ValueError(f"shots[{number}]: ends with the user. Give examples with their answers.")
        messages += [replace(message, weight=0.0) for message in shot.messages if message.role != "system"]
    turns = [message for message in query.messages if message.role != "system"]
    return Conversation((*system, *messages, *turns))
