"""Where an answer ends: at a token, or at a text, whatever its tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megavlm.inference.generate import generate, stream
from megavlm.inference.turn_end import TurnEnd

PIECES = ["", "a", " b", "#", "##", "###", "####", "\n#", "c##", "###x", " "]


class Pieces:
    """A tokenizer of a few pieces; token 0 ends a text."""

    def decode(self, ids: list[int]) -> str:
        return "".join(PIECES[index] for index in ids)


def follow(text: list[str], stop_text: str = "###", stop_ids: frozenset[int] = frozenset([0])) -> tuple[str, list[str]]:
    """The answer, and what came at each token."""
    end = TurnEnd(Pieces(), stop_ids, stop_text)  # type: ignore[arg-type]
    came = []
    for piece in text:
        came.append(Pieces().decode(end.add(PIECES.index(piece))))
    if end.is_open:
        came.append(Pieces().decode(end.rest()))
    return "".join(came), came


# pieces that a model writes -> the answer
@pytest.mark.parametrize(
    ("written", "answer"),
    [
        (["a", " b", "###", "a"], "a b"),
        (["a", "##", "#", "a"], "a"),
        (["a", "#", "#", "#", "a"], "a"),
        (["a", "#", "##", "a"], "a"),
        (["a", "####", "a"], "a"),
        (["a", "#", "a", "##", " b", "###"], "a#a## b"),
        (["a", "##", ""], "a##"),
        (["a", "##"], "a##"),
        (["a", "\n#", "##", "a"], "a"),
        (["a", "c##", "a"], "ac##a"),
        (["a", "#", "#", "a", "#", "", "a"], "a##a#"),
        (["###", "a"], ""),
        (["a", "###x", "a"], "a"),
        (["#", "####"], ""),
    ],
)
def test_a_text_ends_an_answer(written: list[str], answer: str) -> None:
    assert follow(written)[0] == answer


def test_only_what_may_be_the_end_is_held_back() -> None:
    assert follow(["a", "##", " b", "#", "##"])[1] == ["a", "", "## b", "", ""]


def test_without_a_text_nothing_is_held_back() -> None:
    assert follow(["a", "##", "#", "", "a"], stop_text="")[1] == ["a", "##", "#", "", ""]


class Scripted:
    """Logits that choose the tokens of a script."""

    script: tuple[list[str], ...] = ()

    def __init__(self, *arguments: object) -> None:
        self.step = 0

    def logits(self, tokens: list[int] | None) -> torch.Tensor:
        chosen = [PIECES.index(row[self.step]) for row in self.script]
        self.step += 1
        return torch.nn.functional.one_hot(torch.tensor(chosen), len(PIECES)).float()


def parts() -> Any:
    return SimpleNamespace(
        tokenizer=Pieces(), processor=SimpleNamespace(stop_token_ids=frozenset([0]), stop_text="###")
    )


def answers(monkeypatch: pytest.MonkeyPatch, *script: list[str]) -> list[str]:
    monkeypatch.setattr("megavlm.inference.generate._Cached", Scripted)
    monkeypatch.setattr(Scripted, "script", script)
    prompts: Any = [None] * len(script)
    return [Pieces().decode(ids) for ids in generate(parts(), prompts, max_new_tokens=len(script[0]))]


def test_rows_end_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        ["a", "##", "#", "a", "a", "a"],
        ["a", " b", "##", "", "a", "a"],
        ["a", "a", "a", " b", "a", "##"],
        ["###", "a", "a", "a", "a", "a"],
    )
    assert answers(monkeypatch, *rows) == ["a", "a b##", "aaa ba##", ""]


def test_generation_stops_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts are shorter than the tokens that are allowed: a step more would be an error."""
    monkeypatch.setattr("megavlm.inference.generate._Cached", Scripted)
    monkeypatch.setattr(Scripted, "script", (["a", "#", "##"], ["a", "", "a"]))
    prompts: Any = [None, None]
    assert list(stream(parts(), prompts, max_new_tokens=9)) == [[[1], [1]], [[], []], [[], []]]
