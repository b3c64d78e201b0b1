"""Pictures inside a page: small, and as ``data:`` URIs."""

import base64
import io
import math

import numpy
from PIL import Image
from torch import Tensor

from megavlm.data.image import load_image

MOST_IMAGES = 24
MOST_TILES = 128
"""Of a sample; more are counted, not drawn."""

# Pixels of a sample in the page, shared by its images and by its tiles: so the page's size depends on the number of
# samples alone.
_IMAGE_PIXELS = 640 * 480
_TILE_PIXELS = 14 * 160 * 160
_SMALLEST_IMAGE_PIXELS = 96 * 96
_LONGEST_IMAGE_SIDE = 1600
_LARGEST_TILE_SIDE = 192
_SMALLEST_TILE_SIDE = 40

# Where the pictures of a sample have fewer pixels together, they are kept to the pixel.
_MOST_EXACT_PIXELS = 8 * 64 * 64
_JPEG_QUALITY = 82


def image_uri(source: str, max_pixels: int, num_images: int) -> str:
    """Return an image of a sample, made smaller.

    Args:
        source: path or ``data:`` URI.
        max_pixels: larger images are not read.
        num_images: of the sample.

    Raises:
        ImageError: the image cannot be read.
    """
    image = load_image(source, max_pixels)
    room = max(_SMALLEST_IMAGE_PIXELS, _IMAGE_PIXELS // max(1, num_images))
    scale = min(1.0, math.sqrt(room / (image.width * image.height)), _LONGEST_IMAGE_SIDE / max(image.size))
    if scale < 1.0:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return _uri(image, num_images)


def tile_uri(tile: Tensor, num_tiles: int) -> str:
    """Return a tile of a sample, made smaller.

    Args:
        tile: ``[3, H, W]`` uint8, RGB: what the vision encoder normalises.
        num_tiles: of the sample.
    """
    image = Image.fromarray(numpy.ascontiguousarray(tile.permute(1, 2, 0).numpy()))
    room = math.isqrt(_TILE_PIXELS // max(1, num_tiles))
    side = min(image.width, _LARGEST_TILE_SIDE, max(_SMALLEST_TILE_SIDE, room))
    if side < image.width:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    return _uri(image, num_tiles)


def _uri(image: Image.Image, num_alike: int) -> str:
    stream = io.BytesIO()
    kind = "png" if image.width * image.height * num_alike <= _MOST_EXACT_PIXELS else "jpeg"
    image.save(stream, kind.upper(), quality=_JPEG_QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
