"""Images that `pipeline.datasets.prepare` wrote, as a torch data set that travels to workers as its path.

Read with zarr alone: a rank that trains does without xarray and what that loads.

Shape suffixes: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile, is_zipfile

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch.utils.data import Dataset
from zarr.storage import ZipStore

from pipeline.data.pictures import grey
from pipeline.errors import InputError

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

_IMAGES_PER_COUNT = 4096


def channel_statistics(images_NCHW: UInt8) -> tuple[Float64, Float64]:
    """Mean and standard deviation per channel of pixel values taken as 0 to 1; 1 for a channel that is constant."""
    counts_CV = np.zeros((images_NCHW.shape[1], 256))
    for start in range(0, len(images_NCHW), _IMAGES_PER_COUNT):
        for channel in range(len(counts_CV)):
            values = images_NCHW[start : start + _IMAGES_PER_COUNT, channel].ravel()
            counts_CV[channel] += np.bincount(values, minlength=256)
    values_V = np.arange(256) / 255
    share_CV = counts_CV / counts_CV.sum(axis=1, keepdims=True)
    mean_C = share_CV @ values_V
    std_C = np.sqrt((share_CV * (values_V - mean_C[:, None]) ** 2).sum(axis=1))
    return mean_C, np.where(std_C > 0, std_C, 1.0)


class ImageArrays(Dataset[tuple[torch.Tensor, int]]):
    """Images in memory as uint8, given out as float32 normalised per channel: (x/255 - mean) / std, shape (C, H, W).

    Args:
        images_NCHW: Pixels from 0 to 255.
        labels_N: Class of each image.
        mean_C: Per channel, of pixel values taken as 0 to 1.
        std_C: As `mean_C`; above 0.
    """

    def __init__(self, images_NCHW: UInt8, labels_N: Int64, mean_C: Float64, std_C: Float64) -> None:
        self.images_NCHW, self.labels_N, self.mean_C, self.std_C = images_NCHW, labels_N, mean_C, std_C
        self._scale_C11 = torch.from_numpy(1 / (255 * std_C)).to(torch.float32)[:, None, None]
        self._shift_C11 = torch.from_numpy(-mean_C / std_C).to(torch.float32)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        (sample,) = self.__getitems__([index])
        return sample

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """Several samples at once, as torch's DataLoader asks for them."""
        x_NCHW, y_N = self.batch(indices)
        return list(zip(x_NCHW, y_N.tolist(), strict=True))

    def batch(self, indices: Sequence[int] | Int64 | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 (len(indices), C, H, W) and labels int64 (len(indices),)."""
        where = np.asarray(indices, dtype=np.int64)
        x_NCHW = torch.from_numpy(self.images_NCHW[where]).to(torch.float32)
        return x_NCHW.mul_(self._scale_C11).add_(self._shift_C11), torch.from_numpy(self.labels_N[where])


class StoredImages(Dataset[tuple[torch.Tensor, int]]):
    """One split of a prepared store as a torch data set; samples and batches as `ImageArrays` gives them.

    Travels between processes as its path: pixels are read on first use, in the process that uses them.

    Args:
        path: The prepared store.
        split: "train" or "test".
        limit: Use at most so many images, the first ones; all when None.

    Raises:
        InputError: The file is missing or no prepared store, or the limit is below 1.
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    source_name: str
    resized: bool
    warning: str | None

    def __init__(self, path: str | os.PathLike[str], split: Literal["train", "test"], limit: int | None = None) -> None:
        if split not in ("train", "test"):
            raise InputError(f"Split '{split}' is unknown: give 'train' or 'test'.")
        if limit is not None and limit < 1:
            raise InputError(f"A limit of {limit} images leaves no {split} images: give at least 1.")
        # Absolute: a worker need not share the working directory.
        self.path, self.split, self.limit = Path(path).absolute(), split, limit
        with _opened(self.path) as store:
            count, channels, height, width = store[f"{split}_image"].shape
            self.image_shape = (int(channels), int(height), int(width))
            self.classes = tuple(map(str, store["class_name"][:]))
            self.source_name = str(store.attrs["data"])
            self.warning = str(store.attrs["warning"]) or None
            self.resized = _resized(store.attrs)
            self._normalisation: tuple[Float64, Float64] = (store["mean"][:], store["std"][:])
        self._is_grey = False
        self._length: int = count if limit is None else min(limit, count)

    @property
    def normalisation(self) -> tuple[Float64, Float64]:
        """Mean and standard deviation per channel, of pixel values taken as 0 to 1."""
        return self._normalisation

    def in_grey(self) -> StoredImages:
        """The same images with one channel, normalised by what is grey in the training images."""
        with _opened(self.path) as store:
            return self.normalised_by(*channel_statistics(grey(store["train_image"][:])), in_grey=True)

    def normalised_by(self, mean_C: Float64, std_C: Float64, *, in_grey: bool = False) -> StoredImages:
        """The same images normalised by other numbers than those of their training images."""
        found = copy.copy(self)
        found.__dict__.pop("_arrays", None)
        found._normalisation, found._is_grey = (mean_C, std_C), in_grey
        if in_grey:
            found.image_shape = (1, *self.image_shape[1:])
        return found

    @cached_property
    def _arrays(self) -> ImageArrays:
        with _opened(self.path) as store:
            images, labels = (store[f"{self.split}_{part}"][: self._length] for part in ("image", "label"))
            return ImageArrays(grey(images) if self._is_grey else images, labels, *self._normalisation)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_arrays"}

    def __len__(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels and labels, once they are in memory."""
        return self._length * (math.prod(self.image_shape) + np.dtype(np.int64).itemsize)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._arrays[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """Several samples at once, as torch's DataLoader asks for them."""
        return self._arrays.__getitems__(indices)

    def batch(self, indices: Sequence[int] | Int64 | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 (len(indices), C, H, W) and labels int64 (len(indices),)."""
        return self._arrays.batch(indices)


def _resized(attributes: Mapping[str, Any]) -> bool:
    """Whether a size was asked for when the images were prepared."""
    return json.loads(str(attributes.get("configuration", "{}"))).get("image_size") is not None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The prepared store, whose arrays are read when they are asked for."""
    if not path.is_file():
        raise InputError(f"Prepared images {path} do not exist: prepare them first.")
    # zarr closes what it could not open: an AttributeError that would hide the reason.
    if not is_zipfile(path):
        raise InputError(f"{path} is not a store of prepared images: prepare it anew.")
    try:
        with ZipStore(path, mode="r") as zipped:
            yield zarr.open_group(zipped, mode="r")
    except (BadZipFile, KeyError, ValueError, OSError) as error:
        raise InputError(f"{path} is not a store of prepared images ({error}): prepare it anew.") from error
