"""Names and rows that the tests of the data package share.

The byte tokenizer has no merges: token ``4 + b`` is the byte ``b``, so expected ids can be written by hand.
"""

from collections.abc import Iterable

BYTE_SPECIALS = {"<|endoftext|>": 0, "<s>": 1, "<|im_start|>": 2, "<|im_end|>": 3}
NUM_BYTE_TOKENS = 4 + 256
IMAGE = NUM_BYTE_TOKENS
"""Id of the image token that the byte tokenizer gets added."""

TILE_SIZE = 8
TOKENS_PER_TILE = 2


def byte_ids(text: str) -> list[int]:
    """Ids of plain text in the byte tokenizer."""
    return [4 + value for value in text.encode()]


def chat(question: str = "What?", answer: str = "A cat.", images: Iterable[str] = ()) -> dict[str, object]:
    """A LLaVA row of one question and answer."""
    row: dict[str, object] = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    return row | ({"image": list(images)} if images else {})
