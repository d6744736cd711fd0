"""Which pictures 8 bits a channel would cut down: told from the file, as Pillow's picture does not say."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from pipeline.data.pictures import check_picture, grey
from pipeline.errors import InputError


def png(mode: int, channels: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads but cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 4, 4, 16, mode, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(4 * channels * 2) for _ in range(4))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff() -> bytes:
    """A TIFF of 16-bit colours."""
    values = [(256, 3, 4), (257, 3, 4), (259, 3, 1), (262, 3, 2), (273, 4, 200), (277, 3, 3), (278, 3, 4), (279, 4, 96)]
    entries = [struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in values]
    entries.insert(2, struct.pack("<HHII", 258, 3, 3, 190))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    head = (b"II*\0" + struct.pack("<I", 8) + directory).ljust(190, b"\0")
    return (head + struct.pack("<HHH", 16, 16, 16)).ljust(200, b"\0") + bytes(96)


def jpeg_2000(dtype: type) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), dtype)).save(content, "JPEG2000")
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [png(0, 1), png(2, 3), png(4, 2), png(6, 4), tiff(), b"P6 2 2 65535\n" + bytes(24), b"P5 2 2 4095\n" + bytes(8)],
    ids=["grey PNG", "RGB PNG", "grey PNG with alpha", "RGBA PNG", "RGB TIFF", "RGB PPM", "12-bit PGM"],
)
def test_more_than_eight_bits_a_channel_are_refused(content: bytes) -> None:
    with (
        Image.open(io.BytesIO(content)) as image,
        pytest.raises(InputError, match="Image here has more than 8 bits per channel"),
    ):
        check_picture(image, "here")


@pytest.mark.skipif(not features.check("jpg_2000"), reason="needs a Pillow with JPEG 2000")
def test_the_bits_of_jpeg_2000_are_read_from_its_head() -> None:
    with Image.open(io.BytesIO(jpeg_2000(np.uint8))) as image:
        check_picture(image, "here")
    deep = bytearray(jpeg_2000(np.uint8))
    start = deep.index(b"\xff\x4f\xff\x51")
    deep[start + 42] = 11  # bits less 1
    with Image.open(io.BytesIO(bytes(deep))) as image, pytest.raises(InputError, match="more than 8 bits"):
        check_picture(image, "here")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "PPM", "GIF", "WEBP", "ICO", "TGA"])
def test_pictures_of_eight_bits_are_taken(kind: str) -> None:
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (1, 2, 3)).save(content, kind)
    with Image.open(content) as image:
        check_picture(image, "here")


def test_grey_is_that_of_pillow_and_keeps_what_is_grey() -> None:
    colours_NHWC = np.random.default_rng(0).integers(0, 256, (300, 4, 5, 3)).astype(np.uint8)
    found = grey(colours_NHWC.transpose(0, 3, 1, 2))
    assert found.shape == (300, 1, 4, 5)
    for place in (0, 299):
        np.testing.assert_array_equal(found[place, 0], np.asarray(Image.fromarray(colours_NHWC[place]).convert("L")))
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    np.testing.assert_array_equal(grey(values.repeat(3, axis=1)), values)
