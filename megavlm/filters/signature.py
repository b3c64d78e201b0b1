"""Short signatures by which near duplicates are found: MinHash of the text, perceptual hashes of the images.

Sources: MinHash, Broder 1997, as the package datasketch has it; pHash as the package imagehash has it.
"""

import base64
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from megavlm.data import Conversation
from megavlm.data.image import load_image

SHINGLE = 5
"""Characters of a piece of text that is counted as one; characters, since not every script has spaces."""

_BITS = 64
_NO_TEXT = numpy.uint32(0xFFFFFFFF)
_INSTALL = "pip install -r requirements-filters.txt"


@dataclass(frozen=True)
class Signature:
    """Of one sample."""

    text: "numpy.ndarray[tuple[int], numpy.dtype[numpy.uint32]]"
    """``[permutations]`` smallest hash values of the text's pieces; all the largest value for no text."""
    images: tuple[int, ...]
    """A number of 64 bits for each image."""

    @property
    def has_text(self) -> bool:
        """Whether there is any."""
        return bool((self.text != _NO_TEXT).any())

    def to_json(self) -> dict[str, Any]:
        """As it is kept on disk."""
        return {"text": base64.b64encode(self.text.astype("<u4").tobytes()).decode(), "images": list(self.images)}

    @staticmethod
    def from_json(tree: dict[str, Any]) -> "Signature":
        """What :meth:`to_json` wrote."""
        values = numpy.frombuffer(base64.b64decode(tree["text"]), dtype="<u4").astype(numpy.uint32)
        return Signature(values, tuple(tree["images"]))

    def text_similarity(self, other: "Signature") -> float:
        """Estimate of the Jaccard similarity of both texts' pieces."""
        return float((self.text == other.text).mean())

    def image_distance(self, other: "Signature") -> int | None:
        """Most differing bits of a pair of images; None: not the same number of images; 0 where there are none."""
        if len(self.images) != len(other.images):
            return None
        return max(((one ^ two).bit_count() for one, two in zip(self.images, other.images, strict=True)), default=0)


class Signer:
    """Makes signatures. Needs two packages that nothing else here needs."""

    def __init__(self, num_permutations: int) -> None:
        """Import the packages.

        Raises:
            ValueError: one is not installed.
        """
        try:
            import datasketch
            import imagehash
        except ImportError as error:
            raise ValueError(f"near-duplicates: needs the package {error.name}. Install it: {_INSTALL}") from None
        self._minhash = datasketch.MinHash
        self._phash = imagehash.phash
        self._num_permutations = num_permutations

    def sign(self, text: str, conversation: Conversation) -> Signature:
        """Sign a text and the images of a conversation.

        Raises:
            ImageError: an image cannot be read.
        """
        minhash = self._minhash(num_perm=self._num_permutations, seed=1)
        if pieces := shingles(text):
            minhash.update_batch([piece.encode("utf-8", "surrogatepass") for piece in pieces])
        images = tuple(_as_number(self._phash(load_image(image.source)).hash) for image in conversation.images)
        return Signature(minhash.hashvalues.astype(numpy.uint32), images)


def shingles(text: str) -> list[str]:
    """The pieces of a text: every run of :data:`SHINGLE` characters, case and amount of white space left aside."""
    plain = " ".join(text.casefold().split())
    if not plain:
        return []
    return sorted({plain[start : start + SHINGLE] for start in range(max(1, len(plain) - SHINGLE + 1))})


def _as_number(bits: Any) -> int:
    flat = numpy.asarray(bits).reshape(-1)
    assert flat.size == _BITS, flat.size
    return int("".join("1" if bit else "0" for bit in flat), 2)


def image_bands(number: int, most_bits: int) -> Sequence[tuple[int, int]]:
    """Pieces of an image's number; two numbers with at most ``most_bits`` differing bits share at least one."""
    num_bands = most_bits + 1
    bounds = [place * _BITS // num_bands for place in range(num_bands + 1)]
    return [
        (band, (number >> low) & ((1 << (high - low)) - 1))
        for band, (low, high) in enumerate(itertools.pairwise(bounds))
    ]
