"""Prints samples for a terminal: their tokens, coloured by what they are."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megavlm.inspection.summary import SourceSummary
from megavlm.inspection.view import SampleView, SkippedView, TokenKind

STYLES: dict[TokenKind, str] = {"trained": "bold green", "text": "", "tag": "yellow", "image": "cyan"}
"""How each kind of token is printed."""

# Where there are no colours.
_OPENING, _CLOSING = "{{", "}}"


def print_legend(console: Console) -> None:
    """Say what the colours mean."""
    text = Text("tokens: ")
    for kind, style in STYLES.items():
        text.append(f"{kind} ", style)
    if not console.color_system:
        text.append(f"(no colours here: {_OPENING}trained{_CLOSING})")
    console.print(text)


def print_view(console: Console, number: int, view: SampleView | SkippedView) -> None:
    """Print one sample, or why there is none."""
    if isinstance(view, SkippedView):
        skipped = view.skipped
        console.print(Text(f"\n{number}. [{view.source}] {skipped.key}", "bold"))
        console.print(Text(f"SKIPPED: {skipped.reason}: {skipped.message}", "bold red"))
        return
    sample = view.sample
    console.print(Text(f"\n{number}. [{view.source}] {sample.key}", "bold"))
    console.print(Text(describe(view), "dim"))
    for image in view.images:
        grid = f"{image.layout.columns} x {image.layout.rows}{' + thumbnail' if image.layout.has_thumbnail else ''}"
        lost = "; DEGRADED: fewer tiles, so that the sample fits" if image.is_degraded else ""
        shown = image.source if not image.source.startswith("data:") else "inside the sample"
        console.print(Text(f"image {image.size[0]} x {image.size[1]}: {grid} tiles{lost} ({shown})", "dim"))
    console.print(_text(view, is_plain=not console.color_system))


def describe(view: SampleView) -> str:
    """A sample's numbers in one line."""
    sample = view.sample
    counts = f"{sample.num_tokens} tokens, {sample.num_trained_tokens} trained, {sample.tiles.shape[0]} tiles"
    return ", ".join([turns_of(view), counts, *losses_of(view)])


def turns_of(view: SampleView) -> str:
    """Who speaks in turn."""
    return "document" if view.conversation.is_document else " ".join(m.role for m in view.conversation.messages)


def losses_of(view: SampleView) -> list[str]:
    """What a sample has lost so that it fits."""
    sample = view.sample
    return [
        f"{count} {what}"
        for count, what in (
            (sample.num_degraded, "image(s) degraded"),
            (sample.num_dropped_images, "image(s) dropped"),
            (int(sample.is_cut), "text cut off"),
        )
        if count
    ]


def _text(view: SampleView, *, is_plain: bool) -> Text:
    text = Text()
    for span in view.spans:
        shown = span.text
        if span.kind == "image":
            shown = f"[{span.stop - span.start} x tile {span.tile}]"
        elif span.kind == "trained" and is_plain:
            shown = f"{_OPENING}{shown}{_CLOSING}"
        text.append(shown, STYLES[span.kind])
    return text


def print_summary(console: Console, summaries: Sequence[SourceSummary]) -> None:
    """Print what the samples of each source are like."""
    table = Table("source", "samples", "tokens", "trained", "tiles")
    for one in summaries:
        share = f"{100.0 * one.num_trained_tokens / one.num_tokens:.0f}%" if one.num_tokens else "-"
        table.add_row(one.name, str(one.num_samples), str(one.num_tokens), share, str(one.num_tiles))
    console.print(table)
    for one in summaries:
        lost = [f"skipped for {reason}: {count}" for reason, count in sorted(one.reasons.items())]
        for count, what in (
            (one.num_degraded, "images degraded"),
            (one.num_dropped_images, "images dropped"),
            (one.num_cut, "texts cut off"),
        ):
            lost += [f"{what}: {count}"] * bool(count)
        if lost:
            console.print(f"{one.name}: {', '.join(lost)}", markup=False, highlight=False, soft_wrap=True)
