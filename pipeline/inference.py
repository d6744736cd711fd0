"""Classify images with trained weights, on one device, without Dask; and tell how well that goes.

Images are prepared as those that a training validates on: as 8-bit RGB, resized where those were, or grey, and
normalised by the numbers that the weights carry.

Shape suffixes: N images of a batch, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from pipeline.checkpoint import Description, read_weights
from pipeline.data.pictures import grey, is_picture, opened_picture
from pipeline.errors import InputError, first_line
from pipeline.image_sources import pixels_of
from pipeline.networks import network as build
from pipeline.processor import usable_cores
from pipeline.stored_images import ImageArrays, StoredImages, UInt8

Split = Literal["test", "train", "all"]
Advance = Callable[[int, int], None]
"""Takes how many images are done, and of how many."""


class Given(TypedDict, total=False):
    """What may be said of weights, and counts instead of what they say of themselves."""

    model: nn.Module | None
    """Takes the place of a network by name, and gets the weights."""
    network: str | None
    """As `train` takes it: K1:K2, a torchvision name, or package.module:factory."""
    classes: Sequence[str] | None
    image_size: int | tuple[int, int] | None
    """Height and width to which images are resized."""
    mean: Sequence[float] | None
    """Per channel, of pixel values taken as 0 to 1."""
    std: Sequence[float] | None
    device: str | None
    """Such as "cpu" or "cuda:0"; a GPU where there is one if not given."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifier:
    """A trained network with all that is needed to use it."""

    model: nn.Module
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    resized: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    @property
    def is_grey(self) -> bool:
        """Whether it takes pictures of one channel."""
        return self.image_shape[0] == 1

    def normalised(self, images_NCHW: UInt8) -> torch.Tensor:
        """Pixels as the network takes them."""
        pixels = grey(images_NCHW) if self.is_grey else images_NCHW
        labels = np.zeros(len(pixels), np.int64)
        return ImageArrays(pixels, labels, np.array(self.mean), np.array(self.std)).batch(range(len(pixels)))[0]

    def scores(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """What the network gives for images, (N, K), on the CPU."""
        with torch.inference_mode():
            output = self.model(x_NCHW.to(self.device))
        found = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
        if found is None or found.dim() != 2 or found.shape[1] != len(self.classes):
            shape = type(output).__name__ if found is None else f"a tensor of shape {tuple(found.shape)}"
            raise InputError(
                f"the network gives {shape} for {len(x_NCHW)} images, and not one score for each of the "
                f"{len(self.classes)} classes"
            )
        return found.float().cpu()


def load_classifier(
    weights: str | Path,
    *,
    model: nn.Module | None = None,
    network: str | None = None,
    classes: Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | None = None,
) -> Classifier:
    """The network of trained weights, ready to classify; what is given counts instead of what the weights say.

    Raises:
        InputError: The weights cannot be read, do not say what is needed, or do not fit the network.
    """
    state, said = read_weights(weights)
    said = _with_given(said, network, classes, image_size, mean, std)
    place = _device(device)
    wanted = {
        "network": said.network if model is None else type(model).__name__,
        "classes": said.classes,
        "image_size": said.image_shape,
        "mean": said.mean,
        "std": said.std,
    }
    missing = [name for name, value in wanted.items() if value is None]
    if missing:
        raise InputError(
            f"weights '{weights}' do not say their {', '.join(missing)}: give what is missing, or train again with "
            "this version, whose checkpoints say all of it"
        )
    assert said.classes is not None and said.image_shape is not None  # noqa: PT018 - for mypy
    assert said.mean is not None and said.std is not None  # noqa: PT018
    if model is None:
        model = build(str(said.network), classes=len(said.classes), image_shape=said.image_shape)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200].rstrip(".: ")
        name = said.network or type(model).__name__
        raise InputError(f"weights '{weights}' do not fit the network {name}: {reason}") from error
    return Classifier(
        model=model.to(place).eval(), classes=said.classes, image_shape=said.image_shape,
        resized=bool(said.resized), mean=said.mean, std=said.std, device=place,
    )  # fmt: skip


def predict(
    images: str | Path | Sequence[str | Path],
    weights: str | Path,
    *,
    batch_size: int = 64,
    on_progress: Advance | None = None,
    **given: Unpack[Given],
) -> xr.Dataset:
    """Classify image files, or all of a folder: ``probability(image, class)``, and the best one, ``predicted(image)``.

    The weights say how images are prepared, and which network they belong to; what is ``given`` counts instead: see
    ``Given``. Runs in this process, ``batch_size`` images at a time.

    Raises ``InputError`` for files that are no images, folders without any, and weights that do not say enough.
    """
    _check_batch(batch_size)
    classifier = load_classifier(weights, **given)
    paths = image_files(images)
    found = []
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(paths), batch_size):
            some = paths[start : start + batch_size]
            pixels = list(pool.map(lambda path: _pixels(path, classifier), some))
            scores = classifier.scores(classifier.normalised(np.stack(pixels)))
            found.append(F.softmax(scores, dim=1).numpy())
            if on_progress is not None:
                on_progress(start + len(some), len(paths))
    probability_NK = np.concatenate(found)
    names = np.array(classifier.classes, dtype=object)
    return xr.Dataset(
        {
            "probability": (("image", "class"), probability_NK, {"units": "1"}),
            "predicted": ("image", names[probability_NK.argmax(1)]),
        },
        coords={"image": np.array([str(path) for path in paths], dtype=object), "class": names},
        attrs={"weights": str(weights)},
    )


def evaluate(
    data: str | Path,
    weights: str | Path,
    *,
    split: Split = "test",
    batch_size: int = 64,
    root: str | Path | None = None,
    on_progress: Advance | None = None,
    **given: Unpack[Given],
) -> xr.Dataset:
    """How well weights classify data: ``confusion(class, predicted_class)``, ``accuracy``, ``loss`` and more by class.

    ``data`` are as for ``train``: a folder, a file that `data` wrote, or a name; ``split`` says which of its images.
    Those of a folder without a test/ are split as they are for a training. ``root`` is where data sets are downloaded
    to. The rest is as for ``predict``.

    Raises ``InputError`` as ``predict``, and for data with classes that the weights do not know.
    """
    if split not in ("test", "train", "all"):
        raise InputError(f"split '{split}' is unknown: give test, train or all")
    _check_batch(batch_size)
    classifier = load_classifier(weights, **given)
    kinds = len(classifier.classes)
    confusion_KK, losses = np.zeros((kinds, kinds), np.int64), 0.0
    with _prepared(data, classifier, root) as path:
        parts = [_like_trained(StoredImages(path, one), classifier) for one in _splits(split)]
        total, done = sum(map(len, parts)), 0
        for part in parts:
            positions_K = _positions(part.classes, classifier.classes)
            for start in range(0, len(part), batch_size):
                x_NCHW, y_N = part.batch(range(start, min(start + batch_size, len(part))))
                labels_N = torch.from_numpy(positions_K)[y_N]
                scores_NK = classifier.scores(x_NCHW)
                losses += float(F.cross_entropy(scores_NK, labels_N, reduction="sum"))
                np.add.at(confusion_KK, (labels_N.numpy(), scores_NK.argmax(1).numpy()), 1)
                done += len(labels_N)
                if on_progress is not None:
                    on_progress(done, total)
        source = parts[0].source_name
    return _evaluated(confusion_KK, losses / total, classifier.classes, source, str(weights))


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"a batch of {batch_size} images is too small: give at least 1")


def image_files(images: str | Path | Sequence[str | Path]) -> list[Path]:
    """The image files of a choice, in order; of folders all files in them, sorted, without hidden ones.

    Raises:
        InputError: One does not exist, is no image by its name and content, or a folder holds no file.
    """
    given = [images] if isinstance(images, str | Path) else list(images)
    found: list[Path] = []
    for one in map(Path, given):
        if one.is_dir():
            inside = sorted(path for path in one.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(one)))
            if not inside:
                raise InputError(f"folder {one} holds no images: give one that does")
            found += inside
        elif one.is_file():
            found.append(one)
        else:
            raise InputError(f"image {one} does not exist: give image files or folders of them")
    if not found:
        raise InputError("no images were given: give image files or folders of them")
    for path in found:
        if not is_picture(path):
            with opened_picture(path):  # tells, before anything is counted, what is wrong with it
                pass
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _pixels(path: Path, classifier: Classifier) -> UInt8:
    """An image file as the network's images are, uint8 (3, H, W)."""
    _, height, width = classifier.image_shape
    with opened_picture(path) as image:
        if not classifier.resized and image.size != (width, height):
            raise InputError(
                f"image {path} has {image.width}x{image.height} pixels, but the weights were trained on images of "
                f"{width}x{height} that were not resized: give image_size (--image-size) to resize it"
            )
        return pixels_of(image, str(path), (width, height), resize=True, reference="").transpose(2, 0, 1)


def _with_given(
    said: Description,
    network: str | None,
    classes: Sequence[str] | None,
    image_size: int | tuple[int, int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Description:
    """What the weights say, and instead of it what is given."""
    lists = {"classes": classes, "mean": mean, "std": std}
    listed: dict[str, Any] = {name: tuple(values) for name, values in lists.items() if values is not None}
    said = replace(said, network=network or said.network, **listed)
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < 1:
            raise InputError(f"an image_size of {image_size} is too small: give at least 1 pixel")
        channels = said.image_shape[0] if said.image_shape else len(said.mean or (0, 0, 0))
        said = replace(said, image_shape=(channels, height, width), resized=True)
    channels = said.image_shape[0] if said.image_shape else 0
    for name, values in (("mean", said.mean), ("std", said.std)):
        if said.image_shape and values is not None and len(values) != channels:
            raise InputError(f"{name} has {len(values)} values, but the images have {channels} channels: give one each")
    if said.std is not None and min(said.std) <= 0:
        raise InputError(f"std {min(said.std)} must be above 0, as values are divided by it")
    return said


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{name}' cannot be used: {first_line(error)}") from error
    return device


@contextmanager
def _prepared(data: str | Path, classifier: Classifier, root: str | Path | None) -> Iterator[Path]:
    """The prepared store of the data, made for the length of the block where it is none yet."""
    from pipeline.datasets import prepare

    path = Path(data)
    if path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        path = Path(folder, "images.zarr.zip")
        size = classifier.image_shape[1:] if classifier.resized else None
        prepare(data, path, root=root or Path.cwd(), image_size=size, progress=False)
        yield path


def _splits(split: Split) -> Iterator[Literal["train", "test"]]:
    if split in ("train", "all"):
        yield "train"
    if split in ("test", "all"):
        yield "test"


def _like_trained(images: StoredImages, classifier: Classifier) -> StoredImages:
    """The images normalised by what the weights say; raises ``InputError`` where they have another size."""
    _, height, width = classifier.image_shape
    if images.image_shape[1:] != (height, width):
        found = "x".join(map(str, reversed(images.image_shape[1:])))
        raise InputError(
            f"the images of {images.source_name} have {found} pixels, but the weights were trained on images of "
            f"{width}x{height}: give image_size (--image-size) to resize them, or data of that size"
        )
    return images.normalised_by(np.array(classifier.mean), np.array(classifier.std), in_grey=classifier.is_grey)


def _positions(names: Sequence[str], known: Sequence[str]) -> npt.NDArray[np.int64]:
    """Of each class of the data, its position among those of the weights."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"the data have a class '{unknown[0]}' that the weights do not know: theirs are {', '.join(known)}"
        )
    return np.array([list(known).index(name) for name in names], np.int64)


def _evaluated(
    confusion_KK: npt.NDArray[np.int64], loss: float, classes: Sequence[str], source: str, weights: str
) -> xr.Dataset:
    right_K, true_K, told_K = np.diag(confusion_KK), confusion_KK.sum(1), confusion_KK.sum(0)
    with np.errstate(invalid="ignore"):
        recall_K, precision_K = right_K / true_K, right_K / told_K
    names = np.array(classes, dtype=object)
    return xr.Dataset(
        {
            "confusion": (("class", "predicted_class"), confusion_KK, {"units": "1", "long_name": "number of images"}),
            "accuracy": float(right_K.sum() / confusion_KK.sum()),
            "loss": loss,
            "recall": ("class", recall_K, {"units": "1", "comment": "of the images of a class, those that are found"}),
            "precision": ("class", precision_K, {"units": "1", "comment": "of those told to be of it, the right ones"}),
        },
        coords={"class": names, "predicted_class": names},
        attrs={"data": source, "weights": weights},
    )
