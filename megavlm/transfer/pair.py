"""Pairs of tokens of two vocabularies that mean the same."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megavlm.data.tokenizers import Tokenizer

_NO_TEXT = ("\ufffd", "\u2047")
"""What a token that is no whole character decodes to, and SentencePiece's unknown one."""


def pairs_of_captions(captions: Iterable[str], source: Tokenizer, target: Tokenizer) -> tuple[Tensor, int]:
    """Pair the tokens of captions, as VPGTrans does: of each that both vocabularies cut into as many tokens.

    Args:
        captions: texts.
        source, target: the tokenizers.

    Returns:
        Ids ``[num_pairs, 2]`` int64, of source and target, one row for each occurrence; and how many captions gave any.
    """
    pairs: list[tuple[int, int]] = []
    num_used = 0
    for caption in captions:
        ids = [tokenizer.encode(caption, starts_text=True) for tokenizer in (source, target)]
        if ids[0] and len(ids[0]) == len(ids[1]):
            pairs.extend(zip(*ids, strict=True))
            num_used += 1
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2), num_used


def pairs_of_vocabularies(source: Tokenizer, target: Tokenizer) -> Tensor:
    """Pair the tokens that both vocabularies spell alike; a spelling that one of them has twice is left out.

    Returns:
        Ids ``[num_pairs, 2]`` int64, by ascending source id.
    """
    ours, theirs = _by_spelling(source), _by_spelling(target)
    pairs = sorted((index, theirs[spelling]) for spelling, index in ours.items() if spelling in theirs)
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _by_spelling(tokenizer: Tokenizer) -> dict[str, int]:
    spellings = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    times = Counter(spellings)
    return {
        spelling: index
        for index, spelling in enumerate(spellings)
        if spelling.strip() and not any(mark in spelling for mark in _NO_TEXT) and times[spelling] == 1
    }


def read_captions(path: Path) -> list[str]:
    """Read a text file with a caption in each line.

    Raises:
        ValueError: it cannot be read or holds none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--captions={path}: cannot be read ({error}). Give a text file, a caption a line.") from None
    captions = [line for line in lines if line]
    if not captions:
        raise ValueError(f"--captions={path}: holds no text. Give a text file, a caption a line.")
    return captions
