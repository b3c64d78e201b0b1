"""Leaves out samples that are nearly the same as an earlier one: in their text, their images, or both."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megavlm.checkpoint.agreement import from_rank_0, rank
from megavlm.data import Dataset
from megavlm.data.image import ImageError
from megavlm.filters.report import write_report
from megavlm.filters.score_file import ScoreFile
from megavlm.filters.sharing import Result, all_ranks, in_batches, shared
from megavlm.filters.signature import Signature, Signer, image_bands
from megavlm.filters.source import write_kept

Compared = Literal["both", "text", "image"]

_BATCH_SIZE = 64
_ROWS_OF_A_BAND = (
    4  # texts that are alike to 0.5 share one of 32 bands of 4 with probability 0.87; to 0.8 with 1 - 5e-8
)


@dataclass(frozen=True)
class NearDuplicateSettings:
    """When two samples are nearly the same."""

    compared: Compared = "both"
    """``both``: text and images must be alike; or only one of them (a sample without it is never left out)."""
    text_similarity: float = 0.8
    """Least Jaccard similarity of two texts' pieces of five characters."""
    image_bits: int = 4
    """Most differing bits of 64 of two images' perceptual hashes."""
    num_permutations: int = 128
    """Hash values of a text; more estimate the similarity better."""

    def check(self) -> None:
        """Raise ``ValueError`` for numbers out of range."""
        if not 0.5 <= self.text_similarity <= 1:
            raise ValueError(f"--text-similarity={self.text_similarity}: must be from 0.5 to 1.")
        if not 0 <= self.image_bits <= 16:
            raise ValueError(f"--image-bits={self.image_bits}: must be from 0 to 16 of the 64.")
        if self.num_permutations < 32 or self.num_permutations % _ROWS_OF_A_BAND:
            raise ValueError(f"--permutations={self.num_permutations}: must be at least 32, and a multiple of 4.")


@dataclass(frozen=True)
class Match:
    """The earlier sample that one is nearest to."""

    number: int
    similarity: float
    """Of the texts, where they are compared; otherwise one minus the share of differing bits."""


def filter_near_duplicates(
    dataset: Dataset,
    folder: Path,
    settings: NearDuplicateSettings,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[int]:
    """Sign every sample, find the near duplicates, and write what is kept and a report. Collective.

    Args:
        dataset: what is filtered.
        folder: where to; goes on with the signatures in ``scores.jsonl``.
        settings: when samples are nearly the same.
        report: is told how many of how many samples are signed.

    Returns:
        Numbers of the samples that are kept; the same on every rank and for any number of ranks. Of samples that are
        nearly the same the first stays.

    Raises:
        ValueError: a package is missing, the settings are wrong, or the folder cannot be written or holds other scores.
    """
    settings.check()
    signer = Signer(settings.num_permutations)
    depends_on = {
        "filter": "near-duplicates",
        "num_samples": len(dataset),
        "num_permutations": settings.num_permutations,
    }
    file = ScoreFile(folder, depends_on)
    found = from_rank_0(f"opening {file.path}", file.open)
    batches = in_batches(range(len(dataset)), _BATCH_SIZE, set(found))
    report(len(found), len(dataset))

    def sign(numbers: list[int]) -> list[Result]:
        return [_sign(signer, dataset, number) for number in numbers]

    try:
        for came in shared(batches, sign, lambda results: results, all_ranks()):
            if rank() == 0:
                file.add(came)
            found |= {entry["number"]: entry for entry in came}
            report(len(found), len(dataset))
    finally:
        file.close()
    signatures = {number: Signature.from_json(entry) for number, entry in sorted(found.items()) if "text" in entry}
    matches = find_near_duplicates(signatures, settings)
    kept = [number for number in signatures if number not in matches]
    if rank() == 0:
        _write(folder, dataset, settings, found, matches, kept)
    return kept


def _write(
    folder: Path,
    dataset: Dataset,
    settings: NearDuplicateSettings,
    found: Mapping[int, Mapping[str, Any]],
    matches: Mapping[int, Match],
    kept: Sequence[int],
) -> None:
    write_kept(folder, dataset, kept)
    scores: dict[int, dict[str, Any]] = {}
    for number, entry in found.items():
        match = matches.get(number)
        score = None if entry.get("problem") else 0.0 if match is None else match.similarity
        scores[number] = {"score": score, "problem": entry.get("problem")}
    pairs = [
        {"key": found[number]["key"], "kept": found[match.number]["key"], "similarity": match.similarity}
        for number, match in sorted(matches.items())
    ]
    extra = {
        "compared": settings.compared,
        "text_similarity": settings.text_similarity,
        "image_bits": settings.image_bits,
        "near_duplicates": pairs,
    }
    what = "similarity to an earlier sample that is kept (0: none is alike)"
    write_report(folder, dataset, scores, set(kept), what=what, extra=extra)


def _sign(signer: Signer, dataset: Dataset, number: int) -> Result:
    key = f"row {number}"
    try:
        key, conversation = dataset[number]
        signature = signer.sign("\n".join(message.text for message in conversation.messages), conversation)
    except ImageError as error:
        return {"number": number, "key": key, "problem": f"{error.reason}: {error.message}"}
    except ValueError as error:
        return {"number": number, "key": key, "problem": f"row_malformed: {error}"}
    return {"number": number, "key": key, **signature.to_json()}


def find_near_duplicates(signatures: Mapping[int, Signature], settings: NearDuplicateSettings) -> dict[int, Match]:
    """Find the samples to leave out, each with the kept sample that it is nearest to.

    Args:
        signatures: by number, in the order of the samples.
        settings: when samples are nearly the same.
    """
    seen: dict[Hashable, list[int]] = defaultdict(list)
    matches: dict[int, Match] = {}
    for number, signature in signatures.items():
        if (settings.compared == "image" and not signature.images) or (
            settings.compared == "text" and not signature.has_text
        ):
            continue
        bands = list(_bands(signature, settings))
        candidates = sorted({other for band in bands for other in seen.get(band, ())})
        alike = [
            Match(other, similarity)
            for other in candidates
            if (similarity := _similarity(signature, signatures[other], settings)) is not None
        ]
        if alike:
            matches[number] = max(alike, key=lambda match: (match.similarity, -match.number))
            continue
        for band in bands:
            seen[band].append(number)
    return matches


def _bands(signature: Signature, settings: NearDuplicateSettings) -> Iterator[Hashable]:
    """Keys of which near duplicates share one (texts: nearly always)."""
    if settings.compared == "image":
        for band in image_bands(signature.images[0], settings.image_bits):
            yield len(signature.images), band
        return
    values = signature.text.tolist()
    for start in range(0, len(values), _ROWS_OF_A_BAND):
        yield start, tuple(values[start : start + _ROWS_OF_A_BAND])


def _similarity(one: Signature, two: Signature, settings: NearDuplicateSettings) -> float | None:
    """How alike two samples are; None: not enough."""
    text, distance = one.text_similarity(two), one.image_distance(two)
    if settings.compared != "image" and text < settings.text_similarity:
        return None
    if settings.compared != "text" and (distance is None or distance > settings.image_bits):
        return None
    return text if settings.compared != "image" else 1.0 - (distance or 0) / 64
