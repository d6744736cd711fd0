"""Pictures as they lie in files, told apart from what is none and from what 8 bits and one page would cut down."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pipeline.errors import InputError

_FIRST_IS_THE_PICTURE = ("GIF", "MPO", "PSD")
"""Formats whose first frame stands for the file: of an animation, of a photo with its preview, of layers."""
_DEEP = re.compile(r"(?<!BGR);(?:12|16|32|64)")
"""How Pillow writes that a file has more than 8 bits a channel; ``BGR;16`` has 16 bits a pixel."""
_BYTE = 255
_CODESTREAM = b"\xff\x4f\xff\x51"
"""How the image itself begins in a file of JPEG 2000: its sizes follow, then for each channel its bits less 1."""
_HEAD_BYTES = 1 << 16
_CHANNELS_AT = 40
"""Where the number of channels stands, from there on."""

_PICTURES_AT_ONCE = 256


@contextmanager
def opened_picture(path: Path) -> Iterator[Image.Image]:
    """The picture, with whatever goes wrong while it is open told as a problem of this file."""
    try:
        with Image.open(path) as image:
            yield image
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"Image {path} cannot be read: it is not an image, or of a format unknown here.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"Image {path} cannot be read ({error}): replace or remove it.") from error


def is_picture(path: Path) -> bool:
    """Whether the name of a file is that of an image."""
    return path.suffix.lower() in Image.registered_extensions()


def check_picture(image: Image.Image, name: str) -> None:
    """Raise ``InputError`` for a picture that 8 bits a channel and one page would cut down."""
    if image.mode.startswith(("I", "F")) or _is_deep(image):
        raise InputError(f"Image {name} has more than 8 bits per channel: save it with 8.")
    frames = 1 if image.format in _FIRST_IS_THE_PICTURE else getattr(image, "n_frames", 1)
    if frames > 1:
        raise InputError(f"Image {name} has {frames} pages: save the one to train on, or each as a file of its own.")


def _is_deep(image: Image.Image) -> bool:
    """Whether the file has more bits than the picture that Pillow makes of it."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(one, str) and _DEEP.search(one) for one in arguments):
            return True
        if tile[0].startswith("ppm") and any(isinstance(one, int) and one > _BYTE for one in arguments):
            return True
    return image.format == "JPEG2000" and _bits_of_jpeg_2000(image) > 8


def _bits_of_jpeg_2000(image: Any) -> int:
    """The most bits that a channel has; 0 where the head of the file does not say."""
    file = image.fp
    place = file.tell()
    try:
        file.seek(0)
        head: bytes = file.read(_HEAD_BYTES)
    finally:
        file.seek(place)
    start = head.find(_CODESTREAM)
    count_at = start + _CHANNELS_AT
    if start < 0 or len(head) < count_at + 2:
        return 0
    count = int.from_bytes(head[count_at : count_at + 2])
    return max(((bits & 0x7F) + 1 for bits in head[count_at + 2 : count_at + 2 + 3 * count : 3]), default=0)


def grey(images_NCHW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pictures ``(N, 1, H, W)`` of colour ones ``(N, 3, H, W)``, as Pillow's mode L; grey ones keep their values."""
    if images_NCHW.shape[1] == 1:
        return images_NCHW
    found = np.empty((len(images_NCHW), 1, *images_NCHW.shape[2:]), np.uint8)
    for start in range(0, len(found), _PICTURES_AT_ONCE):
        some = slice(start, start + _PICTURES_AT_ONCE)
        red, green, blue = images_NCHW[some].astype(np.uint32).transpose(1, 0, 2, 3)
        found[some, 0] = (red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16
    return found
