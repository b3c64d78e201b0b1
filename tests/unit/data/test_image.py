"""Images of strangers: every mode becomes RGB, every damage one clear error, and nothing is printed."""

import base64
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from PIL import Image

from megavlm.data.image import ImageError, load_image, read_image_size


def failure(read: Callable[[str, int], object], source: Path | str, max_pixels: int = 10_000) -> tuple[str, str] | None:
    """Reason and message with which reading an image fails; ``None`` if it does not."""
    try:
        read(str(source), max_pixels)
    except ImageError as error:
        return error.reason, error.message
    return None


def fails(source: Path | str, reason: str, match: str) -> None:
    """Both functions fail for this reason, or only the one that reads the pixels."""
    found = failure(load_image, source)
    assert found is not None
    assert found[0] == reason
    assert match in found[1]
    assert failure(read_image_size, source) in (found, None)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.png", "RGB"), ("a.png", "RGBA"), ("a.png", "L"), ("a.jpg", "CMYK"), ("a.bmp", "RGB"), ("a.webp", "RGB")],
)
def test_every_mode_becomes_rgb(write_image: Callable[..., Path], name: str, mode: str) -> None:
    path = write_image(name, 20, 10, mode)
    image = load_image(str(path))
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert read_image_size(str(path)) == (20, 10)


def pixel(path: Path) -> tuple[int, ...]:
    return tuple(numpy.asarray(load_image(str(path)))[0, 0].tolist())


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (10, 20, 30, 255)).save(tmp_path / "solid.png")
    Image.new("LA", (2, 2), (100, 0)).save(tmp_path / "grey.png")
    assert pixel(tmp_path / "clear.png") == (255, 255, 255)
    assert pixel(tmp_path / "solid.png") == (10, 20, 30)
    assert pixel(tmp_path / "grey.png") == (255, 255, 255)


def test_palettes_are_looked_up(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.save(tmp_path / "palette.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert pixel(tmp_path / "palette.png") == (9, 8, 7)
    assert pixel(tmp_path / "clear.png") == (255, 255, 255)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (65535, 255), (32768, 127), (300, 1)])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_scaled_to_8(tmp_path: Path, value: int, expected: int, suffix: str) -> None:
    Image.fromarray(numpy.full((2, 2), value, "uint16")).save(tmp_path / f"deep.{suffix}")
    assert pixel(tmp_path / f"deep.{suffix}") == (expected,) * 3


def test_of_an_animation_the_first_frame_is_used(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "moving.gif") == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_s_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    """Orientation 6: what the file holds must be turned right by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (32, 16), "white")
    image.paste("black", (0, 0, 8, 8))
    image.save(tmp_path / f"turned.{suffix}", exif=exif)
    loaded = load_image(str(tmp_path / f"turned.{suffix}"))
    assert loaded.size == read_image_size(str(tmp_path / f"turned.{suffix}"))
    assert loaded.size == ((32, 16) if orientation < 5 else (16, 32))
    corners = {
        corner: loaded.convert("L").getpixel(place) < 128
        for corner, place in {
            "top left": (1, 1),
            "top right": (loaded.width - 2, 1),
            "bottom right": (loaded.width - 2, loaded.height - 2),
            "bottom left": (1, loaded.height - 2),
        }.items()
    }
    black = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
    black |= {5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"}
    assert [corner for corner, is_black in corners.items() if is_black] == [black[orientation]]


def test_a_data_uri_is_read(write_image: Callable[..., Path]) -> None:
    path = write_image("a.png", 5, 7)
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    assert load_image(uri).tobytes() == load_image(str(path)).tobytes()
    assert read_image_size(uri) == (5, 7)


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("data:image/png;base64,%%%", "is not valid base64"),
        ("data:image/png,abc", "is not of the form data:"),
        ("data:image/png;base64,aGVsbG8=", "is no image"),
        ("data:image/png;base64," + "A" * 5000, "image=data:image/png;base64,AAAA"),
    ],
)
def test_a_damaged_data_uri(uri: str, match: str) -> None:
    fails(uri, "image_unreadable", match)


def test_a_missing_image(tmp_path: Path) -> None:
    fails(tmp_path / "no.png", "image_missing", f"image={tmp_path}/no.png: no such file")


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<html>404 not found</html>")
    (tmp_path / "empty.png").write_bytes(b"")
    fails(tmp_path / "page.png", "image_unreadable", "is no image")
    fails(tmp_path / "empty.png", "image_unreadable", "is no image")
    fails(tmp_path, "image_unreadable", "is not a file")
    fails("a\0b", "image_unreadable", "cannot be opened")


def test_a_program_is_not_started_for_postscript(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    fails(tmp_path / "a.png", "image_unreadable", "is no image")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    fails(tmp_path / "pipe.png", "image_unreadable", "is not a file")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp"])
def test_a_truncated_image(tmp_path: Path, name: str) -> None:
    noise = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), "uint8")
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        fails(tmp_path / name, "image_unreadable", "Replace or remove it")


def test_a_floating_point_image(tmp_path: Path) -> None:
    Image.fromarray(numpy.zeros((2, 2), "float32")).save(tmp_path / "f.tiff")
    fails(tmp_path / "f.tiff", "image_unreadable", "floating-point greys")


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; a few kilobytes that unpack to zeros."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    ]
    packed = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + packed


@pytest.mark.parametrize(
    ("size", "match"),
    [
        ((200, 100), "has 200 x 100 = 20000 pixels; data.max_image_pixels=10000"),
        ((12_000, 12_000), "has 12000 x 12000 = 144000000 pixels"),  # Pillow only warns
        ((60_000, 60_000), "more than 178956970 pixels; data.max_image_pixels=10000"),  # Pillow refuses
    ],
)
def test_a_bomb_is_not_unpacked(tmp_path: Path, size: tuple[int, int], match: str) -> None:
    (tmp_path / "bomb.png").write_bytes(png(*size))
    fails(tmp_path / "bomb.png", "image_too_large", match)


def test_the_limit_itself_is_allowed(write_image: Callable[..., Path]) -> None:
    assert load_image(str(write_image("a.png", 100, 100)), max_pixels=10_000).size == (100, 100)


@pytest.mark.parametrize("size", [(0, 10), (10, 0)])
def test_an_image_without_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    header = b"GIF89a" + struct.pack("<HH", *size) + b"\x00\x00\x00"
    frame = b"," + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\x02\x00;"
    (tmp_path / "none.gif").write_bytes(header + frame)
    fails(tmp_path / "none.gif", "image_unreadable", "is no image")


def test_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Damaged EXIF data, a bomb of the size at which Pillow warns, and damaged headers."""
    Image.new("RGB", (8, 8)).save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    (tmp_path / "bomb.png").write_bytes(png(12_000, 12_000))
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "JPEG")
    for cut in range(2, 600, 7):
        (tmp_path / "cut.jpg").write_bytes(stream.getvalue()[:cut] + b"\xff" * 20)
        for name in ("exif.jpg", "bomb.png", "cut.jpg"):
            failure(load_image, tmp_path / name)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
