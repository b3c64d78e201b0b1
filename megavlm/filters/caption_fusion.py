"""Fuses the captions of images with what a model says of them.

Source: CapsFusion (arXiv 2310.20550), as POINTS (arXiv 2409.04828) uses it: a caption model describes each image, and a
language model makes one sentence of the raw caption, which knows more, and the description, which is better written.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.checkpoint import durable
from megavlm.checkpoint.agreement import from_rank_0, rank
from megavlm.data import Conversation, Dataset, Message
from megavlm.filters.report import learnt_text, write_report
from megavlm.filters.score_file import SCORES_NAME, ScoreFile
from megavlm.filters.sharing import Result, Team, in_batches, shared
from megavlm.filters.signature import shingles
from megavlm.filters.writer import Problem, Writer

FUSED_NAME = "fused.jsonl"

CAPTION_PROMPT = "Please briefly describe the image in English."
FUSION_PROMPT = (
    "Merge two captions of one image into a single one. Caption 1 names what is really in the image, people, places "
    "and facts, but may be badly written. Caption 2 is well written, but may lack details or be wrong in them. Keep "
    "the facts of caption 1 and write them as well as caption 2; do not just put one behind the other. Answer with the "
    "merged caption alone.\n\nCaption 1: {raw}\n\nCaption 2: {described}"
)


@dataclass(frozen=True)
class FusionSettings:
    """How captions are fused."""

    caption_prompt: str = CAPTION_PROMPT
    fusion_prompt: str = FUSION_PROMPT
    """With ``{raw}`` and ``{described}``."""
    max_new_tokens: int = 128
    batch_size: int = 8

    def check(self) -> None:
        """Raise ``ValueError`` for what cannot be used."""
        for place in ("{raw}", "{described}"):
            if self.fusion_prompt.count(place) != 1:
                raise ValueError(f"--fusion-prompt={self.fusion_prompt[:80]!r}: must have {place} in it, once.")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"--max-new-tokens={self.max_new_tokens}, --batch-size={self.batch_size}: must be at least 1."
            )


@dataclass(frozen=True)
class Stage:
    """One of the two models at its work."""

    name: str
    """``described`` or ``fused``: under which its texts are kept."""
    model: str
    """Says which model it is."""
    writer: Writer
    team: Team


def run_stage(
    dataset: Dataset,
    folder: Path,
    settings: FusionSettings,
    stage: Stage,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Run one stage: ``described``, and after it ``fused``, which also writes the results. Collective.

    Args:
        dataset: of images with captions.
        folder: of the filter; goes on with what is there.
        settings: how.
        stage: which, and the model.
        report: is told how many of how many samples are done.

    Returns:
        How many samples have a text.

    Raises:
        ValueError: not every image is described yet, or the folder cannot be written or holds texts of other settings.
    """
    if stage.name == "described":
        found = _write_texts(
            dataset, folder, settings, stage, lambda number: _caption_prompt(dataset, settings, number), report
        )
        return sum("text" in entry for entry in found.values())
    described = from_rank_0("reading what was described", lambda: _read_described(folder, len(dataset)))
    fused = _write_texts(
        dataset, folder, settings, stage, lambda number: _fusion_prompt(dataset, settings, described, number), report
    )
    if rank() == 0:
        _finish(dataset, folder, described, fused)
    return sum(bool(entry.get("text", "").strip()) for entry in fused.values())


def _read_described(folder: Path, num_samples: int) -> dict[int, Result]:
    path = folder / "described" / SCORES_NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
        found = {entry["number"]: entry for entry in map(json.loads, lines)}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Run --stage=described first.") from None
    if len(found) != num_samples:
        raise ValueError(
            f"{path}: describes {len(found)} of {num_samples} samples. Run --stage=described again; it goes on."
        )
    return found


def _write_texts(
    dataset: Dataset,
    folder: Path,
    settings: FusionSettings,
    stage: Stage,
    prompt: Callable[[int], Conversation | Problem],
    report: Callable[[int, int], None],
) -> dict[int, Result]:
    """Let one model write for every sample; ``text`` or ``problem`` of each, kept in a folder of their own."""
    depends_on = {
        "filter": f"caption-fusion: {stage.name}",
        "model": stage.model,
        "num_samples": len(dataset),
        "prompt": settings.caption_prompt if stage.name == "described" else settings.fusion_prompt,
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
    }
    file = ScoreFile(folder / stage.name, depends_on)
    found = from_rank_0(f"opening {file.path}", file.open)

    def read(numbers: list[int]) -> list[tuple[int, Conversation | Problem]]:
        return [(number, prompt(number)) for number in numbers]

    def write(asked: list[tuple[int, Conversation | Problem]]) -> list[Result]:
        prompts = [entry for _, entry in asked if not isinstance(entry, Problem)]
        answers = iter(stage.writer.write(prompts, settings.max_new_tokens) if prompts else [])
        results = []
        for number, entry in asked:
            answer = entry if isinstance(entry, Problem) else next(answers)
            results.append({"number": number, "problem" if isinstance(answer, Problem) else "text": str(answer)})
        return results

    try:
        batches = in_batches(range(len(dataset)), settings.batch_size, set(found))
        for came in shared(batches, read, write, stage.team):
            if rank() == 0:
                file.add(came)
            found |= {entry["number"]: entry for entry in came}
            report(len(found), len(dataset))
    finally:
        file.close()
    return found


def _caption_prompt(dataset: Dataset, settings: FusionSettings, number: int) -> Conversation | Problem:
    """What the caption model is asked about a sample: its image, and the prompt."""
    try:
        _, conversation = dataset[number]
    except ValueError as error:
        return Problem(f"row_malformed: {error}")
    if len(conversation.images) != 1 or conversation.is_document or not learnt_text(conversation).strip():
        return Problem(
            f"no_caption: the sample has {len(conversation.images)} images, and must be one with its caption"
        )
    return Conversation((Message("user", (conversation.images[0], "\n" + settings.caption_prompt)),))


def _fusion_prompt(
    dataset: Dataset, settings: FusionSettings, described: Mapping[int, Mapping[str, Any]], number: int
) -> Conversation | Problem:
    """What the language model is asked about a sample: both captions in the prompt."""
    entry = described[number]
    if "text" not in entry:
        return Problem(entry["problem"])
    if not entry["text"].strip():
        return Problem("no_description: the caption model wrote nothing")
    raw = learnt_text(dataset[number][1]).strip()
    before, after = settings.fusion_prompt.split("{raw}")
    text = before.replace("{described}", entry["text"]) + raw + after.replace("{described}", entry["text"])
    return Conversation((Message("user", (text,)),))


def _finish(
    dataset: Dataset, folder: Path, described: Mapping[int, Mapping[str, Any]], fused: Mapping[int, Mapping[str, Any]]
) -> None:
    """Write ``fused.jsonl`` (rows with the new captions), ``scores.jsonl`` and a report. On one rank.

    The score is how much of the fused caption's text is the raw caption's.
    """
    rows: list[str] = []
    entries: dict[int, dict[str, Any]] = {}
    for number in range(len(dataset)):
        entry = fused[number]
        key = f"row {number}"
        if not entry.get("text", "").strip():
            problem = entry.get("problem", "no_text: the language model wrote nothing")
            entries[number] = {"number": number, "key": key, "score": None, "problem": problem}
            continue
        key, conversation = dataset[number]
        raw = learnt_text(conversation).strip()
        texts = {"raw_caption": raw, "described": described[number]["text"]}
        row = {"image": conversation.images[0].source, "caption": entry["text"], **texts, "origin": key}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        entries[number] = {"number": number, "key": key, "score": _overlap(raw, entry["text"])}
    durable.replace_file(folder / FUSED_NAME, "".join(rows).encode())
    lines = "".join(json.dumps(entry) + "\n" for entry in entries.values())
    durable.replace_file(folder / SCORES_NAME, lines.encode())
    kept = [number for number, entry in entries.items() if entry["score"] is not None]
    write_report(
        folder, dataset, entries, set(kept), what="share of the fused caption's text that is the raw caption's"
    )


def _overlap(raw: str, fused: str) -> float:
    of_raw, of_fused = set(shingles(raw)), shingles(fused)
    return sum(piece in of_raw for piece in of_fused) / max(1, len(of_fused))
