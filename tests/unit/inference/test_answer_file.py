"""A file of prompts is answered line by line, in its order, whatever order the answers come in."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megavlm.batch import SkippedSample
from megavlm.data import SampleError
from megavlm.inference import answer
from megavlm.inference.answer import Settings, answer_file


class Processor:
    """Makes a prompt of a conversation's words; of one that says "long" it makes none."""

    def prompt(self, key: str, conversation: Any) -> Any:
        text = conversation.messages[0].text
        if "long" in text:
            raise SampleError(SkippedSample(key, "over_length", "is too long."))
        last = conversation.messages[-1]
        reference = last.text if last.role == "assistant" else ""
        sample = SimpleNamespace(num_tokens=len(text), text=text)
        return SimpleNamespace(sample=sample, reference_answer=reference)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    def generate(_: object, samples: Sequence[Any], **options: Any) -> list[str]:
        return [sample.text.upper() for sample in samples]

    monkeypatch.setattr(answer, "generate", generate)
    engine = SimpleNamespace(data_parallel_size=1, data_parallel_rank=0, gather_over_replicas=lambda item: [item])
    return SimpleNamespace(engine=engine, tokenizer=SimpleNamespace(decode=str), processor=Processor())


def row(question: str, reference: str = "") -> str:
    messages = [{"role": "user", "content": question}]
    return json.dumps({"messages": messages + ([{"role": "assistant", "content": reference}] if reference else [])})


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_lines_keep_their_order(batch_size: int, parts: Any, tmp_path: Path) -> None:
    lines = [row("a" * (number * 7 % 13 + 1)) for number in range(30)]
    lines[4], lines[17], lines[29] = "no row", row("too long"), row("what?", "this")
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    output = tmp_path / "out.jsonl"
    answer_file(parts, tmp_path / "in.jsonl", output, Settings(), batch_size=batch_size, is_writer=True)
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [entry["key"] for entry in found] == [f"in.jsonl:{number}" for number in range(1, 31)]
    assert "error" in found[4]
    assert "is too long" in found[17]["error"]
    assert found[29] == {"key": "in.jsonl:30", "prompt": "what?", "reference": "this", "answer": "WHAT?"}
    for entry in (found[0], found[12]):
        assert entry["answer"] == entry["prompt"].upper()


def test_an_empty_file_gives_an_empty_one(parts: Any, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").touch()
    answer_file(parts, tmp_path / "in.jsonl", tmp_path / "out", Settings(), batch_size=2, is_writer=True)
    assert (tmp_path / "out").read_bytes() == b""
    with pytest.raises(ValueError, match="out: exists"):
        answer_file(parts, tmp_path / "in.jsonl", tmp_path / "out", Settings(), batch_size=2, is_writer=True)
