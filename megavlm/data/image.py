"""Reads images that strangers made: whatever the file holds, the answer is an RGB image or one clear error."""

import base64
import binascii
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

DEFAULT_MAX_PIXELS = 89_478_485
"""Pillow's own limit, about 9,400 x 9,400."""
LARGEST_MAX_PIXELS = 2 * DEFAULT_MAX_PIXELS
"""Above this Pillow refuses to open an image."""

# Formats of photographs and scans only: others start programs (EPS), or are documents or fonts.
_WANTED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
Image.init()
_FORMATS = tuple(name for name in _WANTED_FORMATS if name in Image.OPEN)

# Formats whose orientation tag stands in the header, so that the size is known before the pixels are read. Pillow turns
# TIFF by itself.
_FORMATS_WITH_ORIENTATION = ("JPEG", "MPO", "WEBP")
_ORIENTATION_TAG = 0x0112
_FIRST_SIDEWAYS_ORIENTATION = 5

# What Pillow's readers raise on damaged files.
_READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    OverflowError,
    EOFError,
    MemoryError,
    RuntimeError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
)


class ImageError(Exception):
    """An image that cannot be used."""

    def __init__(self, reason: str, message: str) -> None:
        """Keep both.

        Args:
            reason: ``image_missing``, ``image_unreadable`` or ``image_too_large``.
            message: which image and what is wrong with it.
        """
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


def read_image_size(source: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Return the size that :func:`load_image` would give, from the file's header.

    Returns:
        ``(width, height)`` in pixels.

    Raises:
        ImageError: as :func:`load_image`, as far as the header tells.
    """
    with _open(source, max_pixels) as image:
        width, height = image.size
        is_sideways = _orientation(image) >= _FIRST_SIDEWAYS_ORIENTATION
        return (height, width) if is_sideways else (width, height)


def load_image(source: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Load an image as 8-bit RGB, upright.

    The orientation that cameras write is applied. Of an animation the first frame is used. Transparent images are
    laid on white. 16-bit greys are scaled to 8 bits.

    Args:
        source: path of a file, or a ``data:`` URI.
        max_pixels: larger images are refused before they are unpacked.

    Raises:
        ImageError: the image is missing, damaged, no image, without pixels or too large.
    """
    with _open(source, max_pixels) as image:
        image.load()
        if _orientation(image) > 1:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image, source)


@contextmanager
def _open(source: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image, its size checked; what Pillow raises inside the block becomes an :class:`ImageError`."""
    shown = _shown(source)
    stream = _stream(source)
    try:
        with stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning per image would bury the log
            with Image.open(stream, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise _too_large(shown, f"has {width} x {height} = {width * height} pixels", max_pixels)
                yield image
    except Image.DecompressionBombError:
        raise _too_large(shown, f"has more than {LARGEST_MAX_PIXELS} pixels", max_pixels) from None
    except UnidentifiedImageError:
        raise ImageError(
            "image_unreadable",
            f"image={shown}: is no image, or cut off within its header. Replace or remove it.",
        ) from None
    except _READ_ERRORS as error:
        raise ImageError(
            "image_unreadable",
            f"image={shown}: cannot be read as an image ({type(error).__name__}: {error}). Replace or remove it.",
        ) from None


def _too_large(shown: str, what: str, max_pixels: int) -> ImageError:
    return ImageError(
        "image_too_large",
        f"image={shown}: {what}; data.max_image_pixels={max_pixels}. Shrink the image or raise the limit.",
    )


def _stream(source: str) -> BinaryIO:
    shown = _shown(source)
    if source.startswith("data:"):
        return io.BytesIO(_decode_data_uri(source, shown))
    try:
        mode = os.stat(source).st_mode
        if not stat.S_ISREG(mode):  # reading a pipe or a device would wait for ever
            raise ImageError("image_unreadable", f"image={shown}: is not a file. Check the path.")
        return open(source, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("image_missing", f"image={shown}: no such file. Check the path and image_root.") from None
    except (OSError, ValueError) as error:
        raise ImageError("image_unreadable", f"image={shown}: cannot be opened ({error}).") from None


def _decode_data_uri(source: str, shown: str) -> bytes:
    header, comma, payload = source.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ImageError("image_unreadable", f"image={shown}: is not of the form data:image/...;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("image_unreadable", f"image={shown}: is not valid base64 ({error}).") from None


def _shown(source: str) -> str:
    return source if len(source) <= 200 or not source.startswith("data:") else f"{source[:40]}..."


def _orientation(image: Image.Image) -> int:
    if image.format not in _FORMATS_WITH_ORIENTATION:
        return 1
    value = image.getexif().get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image, source: str) -> Image.Image:
    if image.mode == "F":
        raise ImageError(
            "image_unreadable",
            f"image={_shown(source)}: holds floating-point greys, whose range is unknown. Save it with 8 bits.",
        )
    if image.mode.startswith("I"):
        greys = numpy.clip(numpy.asarray(image).astype(numpy.int64), 0, 65535)
        image = Image.fromarray((greys // 257).astype(numpy.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()
