"""HTML pages as interleaved documents: their text and the images in it, in the order in which they are read."""

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from megavlm.prepare.formats.text import files_with_suffix, read_text
from megavlm.prepare.item import FormatOptions, Item, Row

SUFFIXES = (".html", ".htm", ".xhtml")

_SKIPPED = frozenset({"script", "style", "head", "nav", "noscript", "template", "svg", "iframe", "object", "button"})
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_SECTIONS = frozenset(
    {"address", "article", "aside", "body", "div", "footer", "form", "header", "hr", "main", "section"}
)
_TEXTS = frozenset({"blockquote", "caption", "dd", "dl", "dt", "figcaption", "figure", "ol", "p", "pre", "table", "ul"})
_PARAGRAPHS = _HEADINGS | _SECTIONS | _TEXTS
_LINES = frozenset({"br", "li", "tr"})


@dataclass(frozen=True)
class HtmlFormat:
    """A page, or all ``.html`` files in a folder. Navigation, scripts and styles are left out."""

    source: Path
    options: FormatOptions

    def items(self) -> list[Item]:
        """See :class:`megavlm.prepare.item.Format`."""
        files = files_with_suffix(self.source, SUFFIXES)
        return [Item(path.name if path == self.source else str(path.relative_to(self.source)), path) for path in files]

    def rows(self, item: Item) -> list[Row]:
        """See :class:`megavlm.prepare.item.Format`. A page without any text gives no row that can be used."""
        page = _Page()
        page.feed(read_text(item, self.options.max_row_bytes))
        page.close()
        content = {
            "texts": [text for text, _ in page.entries],
            "images": [None if source is None else _local(source) for _, source in page.entries],
        }
        return [Row(item.where, content, self.options.image_root or item.path.parent)]


def _local(source: str) -> str:
    """An image's path as the file system has it; remote and inline images stay as they are."""
    parts = urlsplit(source) if not source.startswith("data:") else None
    if parts is None or parts.scheme or parts.netloc:
        return source
    return unquote(parts.path)


def _tidy(text: str) -> str:
    """A text without blanks around its line breaks (but for indents) and with at most one blank line in a row."""
    first, *lines = text.split("\n")
    lines = [line[1:] if line.startswith(" ") and not line.startswith("  ") else line for line in lines]
    lines = [first, *lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*(line.rstrip() for line in lines[:-1]), lines[-1]]))


class _Page(HTMLParser):
    """Collects a page's pieces: ``(text, None)`` or ``(None, source of an image)``."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._pieces: list[tuple[str | None, str | None]] = []
        self._skipping: list[str] = []
        self._num_pre = 0

    @property
    def entries(self) -> list[tuple[str | None, str | None]]:
        """Texts and images in turn; no text stands beside another, none is blank."""
        entries: list[tuple[str | None, str | None]] = []
        text = ""
        for piece, source in [*self._pieces, (None, None)]:
            if piece is not None:
                text += piece
                continue
            text = _tidy(text).lstrip() if not entries else _tidy(text)
            if text.strip():
                entries.append((text, None))
            text = ""
            if source is not None:
                entries.append((None, source))
        if entries and entries[-1][0] is not None:
            entries[-1] = (entries[-1][0].rstrip(), None)
        return entries

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a block, leave one out, or place an image."""
        if self._skipping:
            if tag == self._skipping[-1] or tag in _SKIPPED:
                self._skipping.append(tag)
            elif tag == "body":  # the head was not closed
                self._skipping.clear()
            return
        if tag in _SKIPPED:
            self._skipping.append(tag)
        elif tag == "img":
            source = dict(attrs).get("src")
            if source:
                self._pieces.append((None, source))
        elif tag in ("td", "th"):
            self._add(" ")
        else:
            self._add_break(tag)
            self._num_pre += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element without content: nothing of it is to be left out."""
        if tag not in _SKIPPED:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        """End a block, or what is left out."""
        if self._skipping:
            if tag in self._skipping:
                while self._skipping.pop() != tag:
                    pass
            return
        self._add_break(tag)
        self._num_pre = max(0, self._num_pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        """Take text; outside of ``pre`` white space is one space."""
        if not self._skipping:
            self._add(data if self._num_pre else re.sub(r"\s+", " ", data))

    def _add_break(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self._add("\n\n")
        elif tag in _LINES:
            self._add("\n")

    def _add(self, text: str) -> None:
        self._pieces.append((text, None))
