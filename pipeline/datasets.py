"""Images to train on: CIFAR-10, a folder of images, a data set of torchvision, or the digits of scikit-learn.

`load` resolves what was asked for into arrays and says which data they really are. `prepare` does that once and writes
the prepared store, one zarr zip file that every job of the study reads through `pipeline.stored_images`:

    train_image(train, channel, row, column), test_image(test, channel, row, column)  uint8
    train_label(train), test_label(test)  int64, positions in class_name(class)
    mean(channel), std(channel)  of the training images, pixel values taken as 0 to 1

and as attributes, beside the provenance: `data` (its real name), `source`, `warning` ("" or why these data replace the
ones asked for). Images of a folder or of torchvision lie in a random order fixed by the seed, so that the first n are a
sample.

Shape suffixes: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pipeline.errors import InputError
from pipeline.image_sources import (
    Choices,
    RawImages,
    UnavailableError,
    read_cifar10,
    read_digits,
    read_folder,
)
from pipeline.processor import usable_cores
from pipeline.results.provenance import provenance
from pipeline.results.stores import PathLike, write_zip
from pipeline.stored_images import ImageArrays, channel_statistics
from pipeline.torchvision_sources import is_torchvision, read_torchvision


class DataWarning(UserWarning):
    """Other data than those asked for are used."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Training and test images, and what they really are."""

    name: str
    """"CIFAR-10", "digits (scikit-learn)", "folder NAME" or "NAME (torchvision)"."""
    train: ImageArrays
    test: ImageArrays
    classes: tuple[str, ...]
    """Names of the labels 0, 1, ..."""
    source: str
    """Where they came from: a folder, or the package that ships them."""
    warning: str | None = None
    """Why these replace the data asked for, if they do."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width, the same for all images."""
        channels, height, width = self.train.images_NCHW.shape[1:]
        return channels, height, width


def load(
    data: str | PathLike = "auto",
    *,
    root: PathLike,
    image_size: int | tuple[int, int] | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> Images:
    """Resolve a choice of data into arrays in memory.

    Args:
        data: "cifar10"; "digits"; the path of a folder of images, either class folders or train/ and test/ with class
            folders in them (val/, valid/ and validation/ are taken as test/); "torchvision:NAME:FOLDER", a data set of
            torchvision that lies in the folder or is downloaded to it, in `root` without one; or "auto": CIFAR-10, and
            where it is neither in `root` nor reachable the digits, with a DataWarning.
        root: Folder in which CIFAR-10 lies or is downloaded to.
        image_size: Resize all images to this height and width, in pixels; one number makes squares.
        test_fraction: Share of every class that becomes test images where a folder has no test/ of its own, or a data
            set no split, and for the digits.
        seed: Of that split and of the order of a folder's images.
        progress: Show progress bars on standard error.

    Raises:
        InputError: The data cannot be had, an image cannot be read, or images differ in size without an `image_size`.
    """
    choices = Choices(size_HW=_checked_size(image_size), test_fraction=test_fraction, seed=seed, progress=progress)
    if not 0 < test_fraction < 1:
        raise InputError(
            f"A test fraction of {test_fraction} leaves no images to train or to test: give one in (0, 1)."
        )
    if data == "digits":
        return _normalised(read_digits(choices))
    if is_torchvision(str(data)):
        return _normalised(read_torchvision(str(data), Path(root).expanduser(), choices))
    if data not in ("auto", "cifar10"):
        return _normalised(read_folder(Path(data).expanduser(), choices))
    try:
        return _normalised(read_cifar10(Path(root).expanduser(), choices))
    except UnavailableError as error:
        if data == "cifar10":
            raise InputError(f"{error}: put its archive for Python there, or choose 'digits' or a folder.") from error
        warning = f"{error}: the digits that ship with scikit-learn are used instead."
    warnings.warn(warning, DataWarning, stacklevel=2)
    return _normalised(read_digits(choices), warning)


def prepare(
    data: str | PathLike,
    path: PathLike,
    *,
    root: PathLike,
    image_size: int | tuple[int, int] | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> Images:
    """Resolve the data once and write the prepared store to `path`, whole or not at all; arguments as for `load`.

    Raises:
        InputError: As `load`.
    """
    choice = {"data": str(data), "image_size": image_size, "test_fraction": test_fraction, "seed": seed}
    images = load(data, root=root, image_size=image_size, test_fraction=test_fraction, seed=seed, progress=progress)
    write_zip(_store(images, choice), path)
    return images


def _checked_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise InputError(f"An image_size of {image_size} is too small: height and width must be at least 1 pixel.")
    return height, width


def _normalised(raw: RawImages, warning: str | None = None) -> Images:
    mean_C, std_C = channel_statistics(raw.train[0])
    train, test = (ImageArrays(images, labels, mean_C, std_C) for images, labels in (raw.train, raw.test))
    return Images(name=raw.name, train=train, test=test, classes=raw.classes, source=raw.source, warning=warning)


def _store(images: Images, choice: dict[str, Any]) -> xr.Dataset:
    pixel, label, value = (
        {"units": "1", "long_name": "pixel value, 0 to 255"},
        {"units": "1", "long_name": "class of the image"},
        {"units": "1", "comment": "of the training images, pixel values taken as 0 to 1"},
    )
    variables: dict[str, Any] = {
        "class_name": ("class", np.array(images.classes, object), {"units": "1", "long_name": "name of the class"}),
        "mean": ("channel", images.train.mean_C, {**value, "long_name": "mean of the channel"}),
        "std": ("channel", images.train.std_C, {**value, "long_name": "standard deviation of the channel"}),
    }
    for split, arrays in (("train", images.train), ("test", images.test)):
        variables[f"{split}_image"] = ((split, "channel", "row", "column"), arrays.images_NCHW, pixel)
        variables[f"{split}_label"] = (split, arrays.labels_N, label)
    origin = provenance(choice, emulated=False, data=images.name, threads={"decoding": usable_cores()})
    return xr.Dataset(variables, attrs={**origin, "source": images.source, "warning": images.warning or ""})
