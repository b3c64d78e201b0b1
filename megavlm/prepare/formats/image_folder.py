"""Folders of images with their captions beside them."""

from dataclasses import dataclass
from pathlib import Path

from megavlm.prepare.formats.rows import decode_row, line_spans
from megavlm.prepare.item import FormatOptions, Item, Row, RowError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".jp2", ".tga")
METADATA_NAME = "metadata.jsonl"

_TEXT_KEYS = ("text", "caption")


@dataclass(frozen=True)
class ImageFolderFormat:
    """Images with captions: ``cat.txt`` beside ``cat.jpg``, or ``metadata.jsonl`` with ``file_name`` and ``text``.

    A ``metadata.jsonl`` speaks for its whole folder; images that it does not name are not taken.
    """

    source: Path
    options: FormatOptions

    def items(self) -> list[Item]:
        """See :class:`megavlm.prepare.item.Format`."""
        if not self.source.is_dir():
            raise ValueError(f"source={self.source}: is no folder. --format=imagefolder needs one.")
        listed = sorted(self.source.rglob(METADATA_NAME))
        spoken_for = {path.parent for path in listed}
        items: list[Item] = []
        for path in listed:
            name = path.relative_to(self.source)
            items += [Item(f"{name}:{number}", path, span=span) for number, span in line_spans(path)]
        images = sorted(path for path in self.source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        items += [
            Item(str(path.relative_to(self.source)), path)
            for path in images
            if not spoken_for.intersection(path.parents)
        ]
        if not items:
            raise ValueError(f"source={self.source}: has no images. Check the path and --format.")
        return items

    def rows(self, item: Item) -> list[Row]:
        """See :class:`megavlm.prepare.item.Format`."""
        if item.span is not None:
            return [Row(item.where, self._listed(item), self.options.image_root or item.path.parent)]
        beside = item.path.with_suffix(".txt")
        try:
            caption = beside.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            raise RowError(item.where, "row_malformed", f"has no caption: {beside.name} is not there.") from None
        except UnicodeDecodeError as error:
            raise RowError(
                item.where, "row_malformed", f"{beside.name} is not UTF-8 text (byte {error.start})."
            ) from None
        except OSError as error:
            raise RowError(item.where, "row_malformed", f"{beside.name} cannot be read ({error.strerror}).") from None
        return [Row(item.where, {"image": item.path.name, "caption": caption}, item.path.parent)]

    def _listed(self, item: Item) -> dict[str, object]:
        row = decode_row(item.where, item.read_line())
        texts = [row[key] for key in _TEXT_KEYS if key in row]
        if not isinstance(row.get("file_name"), str) or len(texts) != 1:
            keys = ", ".join(sorted(map(str, row))) or "none"
            raise RowError(
                item.where, "row_malformed", f"needs file_name, and text or caption, each once (keys: {keys})."
            )
        return {"image": row["file_name"], "caption": texts[0]}
