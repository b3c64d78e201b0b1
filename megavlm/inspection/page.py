"""Writes pages: one HTML file each, with everything in it, that asks nothing of any network."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from megavlm.inspection.card import SampleCard, UnusedCard
from megavlm.inspection.histogram import Histogram
from megavlm.inspection.summary import SourceSummary
from megavlm.inspection.token_view import CATEGORIES

_FOLDER = resources.files("megavlm.inspection") / "template"


@dataclass(frozen=True)
class BrokenRow:
    """A row that cannot be used."""

    source: str
    reason: str
    key: str
    message: str


@dataclass(frozen=True)
class PageSummary:
    """What a data set is like."""

    scope: str
    """What was counted."""
    sources: tuple[SourceSummary, ...]
    tiles: Histogram
    lengths: Histogram
    num_broken: int
    reasons: tuple[tuple[str, int], ...]
    broken: tuple[BrokenRow, ...]
    """Those that are listed."""


class PageWriter:
    """Makes pages of one look."""

    def __init__(self, title: str, subtitle: str, source_names: Sequence[str], tile_size: int) -> None:
        """Read the template.

        Args:
            title, subtitle: of every page, legible.
            source_names: of the data, legible.
            tile_size: side of a tile, in pixels.
        """
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        self._template = environment.from_string(_read("page.html.jinja"))
        style, script = _read("page.css"), _read("page.js")
        self._always = {
            "title": title,
            "subtitle": subtitle,
            "source_names": source_names,
            "tile_size": tile_size,
            "categories": CATEGORIES,
            "style": Markup(style),
            "style_hash": Markup(_hash(style)),
            "script": Markup(script),
            "script_hash": Markup(_hash(script)),
        }

    def render(
        self,
        cards: Sequence[SampleCard | UnusedCard],
        addresses: Mapping[int, str],
        *,
        summary: PageSummary | None = None,
        has_cards: bool = True,
        index_address: str = "",
    ) -> str:
        """Make a page.

        Args:
            cards: the samples on it.
            addresses: where a sample is shown, by its number: ``#s4`` or ``0004.html``.
            summary: None: a page of a single sample.
            has_cards: whether samples are shown whole, or named and linked.
            index_address: of the page with the summary, if it is another.
        """
        return self._template.render(
            **self._always,
            cards=cards,
            kinds=sorted({card.kind for card in cards}),
            addresses=addresses,
            summary=summary,
            has_cards=has_cards,
            index_address=index_address,
        )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source of a content security policy: this text and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"
