"""Readers of images as they are found: CIFAR-10, a folder of images, the digits of scikit-learn.

`torchvision_sources` reads the other data sets of torchvision with the same helpers.

Shape suffixes: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
import queue
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from pipeline._torchvision import make_importable
from pipeline.data.pictures import check_picture, is_picture, opened_picture
from pipeline.errors import InputError
from pipeline.files import written_whole
from pipeline.processor import usable_cores
from pipeline.stored_images import Int64, UInt8

CIFAR10_NAME = "CIFAR-10"
DIGITS_NAME = "digits (scikit-learn)"

SILENCE_LIMIT_S = 8.0
"""How long a server may be silent."""
_DOWNLOAD_CHUNK_BYTES = 1 << 18
_DIGITS_SIZE = (32, 32)
_TEST_FOLDERS = ("test", "val", "valid", "validation")
_FILES_PER_TASK = 128
_IMAGES_PER_RESIZE = 1024


class UnavailableError(Exception):
    """Data are not there and cannot be downloaded; says where and why, without a full stop."""


@dataclass(frozen=True, kw_only=True)
class RawImages:
    """Images as uint8 (N, C, H, W) with labels (N,), and what they are."""

    name: str
    source: str
    classes: tuple[str, ...]
    train: tuple[UInt8, Int64]
    test: tuple[UInt8, Int64]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How to read, whatever the source."""

    size_HW: tuple[int, int] | None
    """Size to resize to, in pixels; as found when None."""
    test_fraction: float
    seed: int
    progress: bool


def read_cifar10(root: Path, choices: Choices) -> RawImages:
    """CIFAR-10 from `root`, downloaded to it first where needed and checked by torchvision's checksums.

    Raises:
        UnavailableError: It is neither there nor reachable; known within about ten seconds.
    """
    make_importable()
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    try:
        try:
            train = CIFAR10(root, train=True)
        except RuntimeError:  # Not there, or damaged.
            archive = root / CIFAR10.filename
            if not check_integrity(archive, CIFAR10.tgz_md5):
                _download(CIFAR10.url, archive, progress=choices.progress)
            train = CIFAR10(root, train=True, download=True)
        test = CIFAR10(root, train=False)
    except (OSError, HTTPException, RuntimeError) as error:
        raise UnavailableError(
            f"{CIFAR10_NAME} is not in {root} and cannot be had from {CIFAR10.url} ({error})"
        ) from error
    splits = [
        (_resized(split.data.transpose(0, 3, 1, 2), choices.size_HW), np.asarray(split.targets, np.int64))
        for split in (train, test)
    ]
    return RawImages(name=CIFAR10_NAME, source=str(root), classes=tuple(train.classes), train=splits[0], test=splits[1])


def read_digits(choices: Choices) -> RawImages:
    """The 1,797 handwritten digits that ship with scikit-learn, enlarged from 8x8 grey values to 3x32x32."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    grey_NHW = np.rint(bundle.images * (255 / 16)).astype(np.uint8)
    images_NCHW = np.repeat(_resized(grey_NHW[:, None], choices.size_HW or _DIGITS_SIZE), 3, axis=1)
    labels = bundle.target.astype(np.int64)
    train, test = stratified_split(labels, choices)
    return RawImages(
        name=DIGITS_NAME,
        source="scikit-learn",
        classes=tuple(map(str, bundle.target_names)),
        train=(images_NCHW[train], labels[train]),
        test=(images_NCHW[test], labels[test]),
    )


def read_folder(folder: Path, choices: Choices) -> RawImages:
    """Images of class folders, or of train/ and test/ with class folders in them, in an order the seed decides.

    Raises:
        InputError: The folder or a class of it has no images, an image cannot be read, or their sizes differ.
    """
    if not folder.is_dir():
        raise InputError(
            f"Data '{folder}' is not a folder that exists: give 'auto', 'cifar10', 'digits', the path of a folder, or "
            "'torchvision:NAME:FOLDER'."
        )
    training_folder, test_folder = _split_folders(folder)
    classes = [child.name for child in _subfolders(training_folder)]
    if len(classes) < 2:
        found = f"only the class folder '{classes[0]}'" if classes else "no class folders"
        raise InputError(f"Folder {training_folder} has {found}: put each of at least two classes into its own folder.")
    train = _listed(training_folder, classes)
    for label, name in enumerate(classes):
        if not (train.labels == label).any():
            raise InputError(f"Folder {training_folder / name} holds no images: add some or remove it.")
    if test_folder is None:
        train, test = (train.subset(where) for where in stratified_split(train.labels, choices, classes))
    else:
        test = _test_listing(test_folder, training_folder, classes)
        random = np.random.default_rng(choices.seed)
        train, test = (listing.subset(random.permutation(len(listing.paths))) for listing in (train, test))

    paths = [*train.paths, *test.paths]
    images_NCHW = decoded(
        [str(path) for path in paths], lambda index: opened_picture(paths[index]), str(folder), choices
    )
    count = len(train.paths)
    return RawImages(
        name=f"folder {folder.resolve().name}",
        source=str(folder.resolve()),
        classes=tuple(classes),
        train=(images_NCHW[:count], train.labels),
        test=(images_NCHW[count:], test.labels),
    )


@dataclass(frozen=True)
class _Listing:
    paths: list[Path]
    labels: Int64

    def subset(self, where: Int64) -> _Listing:
        return _Listing([self.paths[i] for i in where], self.labels[where])


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _split_folders(folder: Path) -> tuple[Path, Path | None]:
    """The folder of training images and that of test images, if it has one."""
    training = folder / "train"
    # A train/ without folders in it is a class of that name.
    if not (training.is_dir() and _subfolders(training)):
        return folder, None
    for name in _TEST_FOLDERS:
        if (folder / name).is_dir():
            return training, folder / name
    raise InputError(f"Folder {folder} has train/ but no test/: add one, or give {training} to have it split.")


def _listed(folder: Path, classes: Sequence[str]) -> _Listing:
    """All files of the class folders; raises ``InputError`` for one that is no image, or an image outside of them."""
    make_importable()
    from torchvision.datasets.folder import make_dataset

    astray = next(
        (one for one in sorted(folder.iterdir()) if one.is_file() and _is_visible(one) and is_picture(one)), None
    )
    if astray is not None:
        raise InputError(f"Image {astray} lies beside the class folders: put it into that of its class, or remove it.")
    positions = {name: position for position, name in enumerate(classes)}
    samples = make_dataset(str(folder), positions, is_valid_file=lambda _: True, allow_empty=True)
    visible = [(Path(path), label) for path, label in samples if _is_visible(Path(path))]
    for path, _ in visible:
        if not is_picture(path):
            with opened_picture(path):  # tells what is wrong with it before anything is counted
                pass
    return _Listing([path for path, _ in visible], np.array([label for _, label in visible], np.int64))


def _is_visible(path: Path) -> bool:
    """Some systems leave hidden companions such as ._0001.jpg, which are not images."""
    return not path.name.startswith(".")


def _test_listing(folder: Path, training_folder: Path, classes: Sequence[str]) -> _Listing:
    for child in _subfolders(folder):
        if child.name not in classes:
            raise InputError(f"Folder {child} is a class that {training_folder} lacks: add it there or remove it here.")
    listing = _listed(folder, classes)
    if not listing.paths:
        raise InputError(f"Folder {folder} holds no images in class folders: add some or remove it.")
    return listing


def stratified_split(labels: Int64, choices: Choices, classes: Sequence[str] | None = None) -> tuple[Int64, Int64]:
    """Positions of training and test images in random order; of each class the test fraction, but at least 1."""
    random = np.random.default_rng(choices.seed)
    train: list[Int64] = []
    test: list[Int64] = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            name = classes[label] if classes else label
            raise InputError(f"Class '{name}' has 1 image: it needs at least 2, one to train and one to test.")
        count = min(max(1, round(choices.test_fraction * len(members))), len(members) - 1)
        test.append(members[:count])
        train.append(members[count:])
    return random.permutation(np.concatenate(train)), random.permutation(np.concatenate(test))


def decoded(
    names: Sequence[str],
    opened: Callable[[int], AbstractContextManager[Image.Image]],
    source: str,
    choices: Choices,
    *,
    threads: int | None = None,
) -> UInt8:
    """All images as RGB (N, 3, H, W), of one size.

    Args:
        names: What errors call each image.
        opened: Gives the image at a position, open.
        source: What errors and the progress bar call all of them.
        choices: How to read.
        threads: As many as there are cores if None.

    Raises:
        InputError: An image cannot be read, sizes differ without a size to resize to, or memory does not suffice.
    """
    with opened(0) as image:
        size_WH = (choices.size_HW[1], choices.size_HW[0]) if choices.size_HW else image.size
    shape = (len(names), 3, size_WH[1], size_WH[0])
    _check_memory(shape, source)
    images_NCHW = np.empty(shape, np.uint8)

    def fill(start: int) -> int:
        end = min(start + _FILES_PER_TASK, len(names))
        for position in range(start, end):
            with opened(position) as image:
                pixels_HWC = pixels_of(
                    image, names[position], size_WH, resize=choices.size_HW is not None, reference=names[0]
                )
            images_NCHW[position] = pixels_HWC.transpose(2, 0, 1)
        return end - start

    with (
        _progress_bar(f"Reading {source}", len(names), shown=choices.progress) as advance,
        ThreadPoolExecutor(threads or usable_cores()) as pool,
    ):
        for count in pool.map(fill, range(0, len(names), _FILES_PER_TASK)):
            advance(count)
    return images_NCHW


def pixels_of(image: Image.Image, name: str, size_WH: tuple[int, int], *, resize: bool, reference: str) -> UInt8:
    """An open image as 8-bit RGB (H, W, 3) of that size; ``InputError`` for one that cannot be, or must not be resized.

    ``name`` and ``reference`` are what errors call it and the image whose size it should have.
    """
    check_picture(image, name)
    if image.size != size_WH:
        if not resize:
            raise InputError(
                f"Images differ in size: {name} is {_text(image.size)} pixels, {reference} is {_text(size_WH)}; "
                "set image_size (--image-size) to resize all of them."
            )
        image.draft("RGB", size_WH)  # Lets the JPEG decoder skip what the resizing would throw away.
        return np.asarray(image.convert("RGB").resize(size_WH, Image.Resampling.BILINEAR))
    return np.asarray(image.convert("RGB"))


def _text(size_WH: tuple[int, int]) -> str:
    return f"{size_WH[0]}x{size_WH[1]}"


def _check_memory(shape: tuple[int, ...], source: str) -> None:
    # Writing the store takes a second copy, encoded.
    needed, free = 2 * math.prod(shape), psutil.virtual_memory().available
    if needed > free:
        pixels = _text((shape[3], shape[2]))
        raise InputError(
            f"The {shape[0]} images of {source} at {pixels} pixels need {needed / 2**30:.1f} GiB of memory, "
            f"{free / 2**30:.1f} GiB are free: set a smaller image_size."
        )


def _resized(images_NCHW: UInt8, size_HW: tuple[int, int] | None) -> UInt8:
    if size_HW is None or images_NCHW.shape[2:] == size_HW:
        return np.ascontiguousarray(images_NCHW)
    resized = np.empty((*images_NCHW.shape[:2], *size_HW), np.uint8)
    for start in range(0, len(images_NCHW), _IMAGES_PER_RESIZE):
        some = slice(start, start + _IMAGES_PER_RESIZE)
        pixels = torch.from_numpy(images_NCHW[some].astype(np.float32))
        pixels = torch.nn.functional.interpolate(pixels, size_HW, mode="bilinear", antialias=True)
        resized[some] = pixels.round_().clamp_(0, 255).numpy()
    return resized


def _download(url: str, path: Path, *, progress: bool) -> None:
    """Fetch a file; it appears under its name only when complete. Raises OSError or HTTPException."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_whole(path) as aside,
        _answer(url) as response,
        aside.open("wb") as file,
        _progress_bar(f"Downloading {path.name}", response.length, shown=progress, in_bytes=True) as advance,
    ):
        while piece := response.read(_DOWNLOAD_CHUNK_BYTES):
            file.write(piece)
            advance(len(piece))


def _answer(url: str) -> HTTPResponse:
    """The response, its head received. Asked for in a thread: no socket timeout bounds the look-up of a name."""
    answers: queue.SimpleQueue[HTTPResponse | BaseException] = queue.SimpleQueue()

    def ask() -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "pytorch/vision"})
        try:
            answers.put(urllib.request.urlopen(request, timeout=SILENCE_LIMIT_S))
        except Exception as error:  # noqa: BLE001 - handed to the thread that waits
            answers.put(error)

    threading.Thread(target=ask, name="download", daemon=True).start()
    try:
        answer = answers.get(timeout=SILENCE_LIMIT_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {SILENCE_LIMIT_S:g} s") from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


@contextmanager
def _progress_bar(
    description: str, total: int | None, *, shown: bool, in_bytes: bool = False
) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
