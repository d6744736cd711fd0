"""The data sets of torchvision by name, for classification: split, downloaded and read as the other images are."""

from __future__ import annotations

import difflib
import inspect
import io
import numbers
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from PIL import Image

from pipeline._torchvision import make_importable
from pipeline.errors import InputError
from pipeline.image_sources import SILENCE_LIMIT_S, Choices, RawImages, decoded, stratified_split

_PREFIX = "torchvision:"
_TEST_SPLITS = ("test", "val", "valid")
_LONGEST_REASON = 300
_FURTHER_ARGUMENTS = {"EMNIST": {"split": "balanced"}}
"""Arguments that a data set needs beside its root, its split and whether to download."""


def is_torchvision(data: str) -> bool:
    """Whether the choice of data has the form `torchvision:NAME` or `torchvision:NAME:FOLDER`."""
    return data.startswith(_PREFIX)


def read_torchvision(data: str, root: Path, choices: Choices) -> RawImages:
    """The data set of that name, from its folder or else `root`, downloaded to it first where it can be.

    Data sets without a test split of their own are split by class. The order of the images is random, fixed by the
    seed.

    Raises:
        InputError: No such data set, or it cannot be had; it is none for classification; or images differ in size.
    """
    name, _, folder = data.removeprefix(_PREFIX).partition(":")
    source = _Source(name, Path(folder).expanduser() if folder else root, choices)
    parts = source.splits()
    random = np.random.default_rng(choices.seed)
    order = [(part, int(index)) for part in range(len(parts)) for index in random.permutation(len(parts[part]))]
    labels_N = np.zeros(len(order), np.int64)

    @contextmanager
    def opened(position: int) -> Iterator[Image.Image]:
        part, index = order[position]
        image, labels_N[position] = source.item(parts[part], index)
        yield image

    names = [f"{index} of {name}{' (test)' if part else ''}" for part, index in order]
    # One thread: some data sets seed a generator, or move in a file, for each image.
    images_NCHW = decoded(names, opened, name, choices, threads=1)
    classes = _class_names(parts[0], int(labels_N.max()) + 1)
    train, test = np.split(np.arange(len(order)), [len(parts[0])])
    if len(parts) == 1:
        train, test = stratified_split(labels_N, choices, classes)
    return RawImages(
        name=f"{name} (torchvision)",
        source=str(source.root),
        classes=classes,
        train=(images_NCHW[train], labels_N[train]),
        test=(images_NCHW[test], labels_N[test]),
    )


class _Source:
    """A data set class of torchvision, and how its splits are asked for."""

    def __init__(self, name: str, root: Path, choices: Choices) -> None:
        self.name, self.root = name, root
        self._choices = choices
        self._class = _class_named(name)
        self._parameters = inspect.signature(self._class).parameters
        self._further = _FURTHER_ARGUMENTS.get(name, {})
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        missing = [
            one.name
            for one in self._parameters.values()
            if one.default is one.empty and one.kind not in variadic and one.name not in ("root", *self._further)
        ]
        if missing:
            raise InputError(
                f"Data set {name} of torchvision needs the argument {', '.join(missing)}, which cannot be given here: "
                "train on it with pipeline.fit."
            )

    def splits(self) -> list[Sequence[Any]]:
        """Training and test images, or all of them in one where the data set does not tell them apart."""
        if "train" in self._parameters or self._further:
            return [self._made(train=True), self._made(train=False)]
        if "split" not in self._parameters:
            return [self._made()]
        default = self._parameters["split"].default
        train = default if isinstance(default, str) and default.startswith("train") else "train"
        return [self._made(split=train), self._test_split()]

    def item(self, dataset: Sequence[Any], index: int) -> tuple[Image.Image, int]:
        """An image and its class."""
        try:
            item = dataset[index]
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(
                f"Image {index} of {self.name} in {self.root} cannot be read ({_line(error)}): get the data set anew."
            ) from error
        image, label = item if isinstance(item, tuple) and len(item) == 2 else (None, -1)
        if not isinstance(image, Image.Image) or not _is_class(label):
            raise InputError(
                f"Data set {self.name} of torchvision is none for classification: image {index} is not a pair of an "
                "image and the number of its class."
            )
        return image, int(label)

    def _test_split(self) -> Sequence[Any]:
        reason: InputError | None = None
        for split in _TEST_SPLITS:
            try:
                found = self._made(split=split)
                self.item(found, 0)  # Some keep the labels of the test images to themselves.
            except InputError as error:
                reason = reason or error
            else:
                return found
        assert reason is not None
        raise reason

    def _made(self, **split: Any) -> Sequence[Any]:
        """The split, from the folder if it is there, else downloaded."""
        arguments = {**split, **self._further}
        if "root" in self._parameters:
            arguments["root"] = str(self.root)
        can_download = "download" in self._parameters or bool(self._further)
        attempts = [{"download": False}, {"download": True}] if can_download else [{}]
        problem: Exception | None = None
        for attempt in attempts:
            try:
                with _undisturbed(self.root, shown=self._choices.progress):
                    made: Sequence[Any] = self._class(**arguments, **attempt)
            except ImportError as error:
                raise InputError(f"Data set {self.name} of torchvision cannot be read: {_line(error)}.") from error
            except Exception as error:  # noqa: BLE001 - from damaged archives to silent servers
                problem = error
                continue
            if not len(made):
                raise InputError(f"Data set {self.name} in {self.root} holds no images.")
            return made
        assert problem is not None
        how = "could not be downloaded" if can_download else "cannot be downloaded"
        raise InputError(
            f"Data set {self.name} is not in {self.root} and {how} ({_line(problem)}): put its files there, or choose "
            "other data."
        ) from problem


def _class_named(name: str) -> Any:
    make_importable()
    from torchvision import datasets

    known = [one for one in datasets.__all__ if one != "VisionDataset"]
    if name not in known:
        alike = {one.lower(): one for one in known}
        close = difflib.get_close_matches(name.lower(), alike, n=1)
        hint = f"did you mean {alike[close[0]]}?" if close else "give one such as FashionMNIST."
        raise InputError(f"Data set '{name}' of torchvision is unknown: {hint}")
    return getattr(datasets, name)


@contextmanager
def _undisturbed(root: Path, *, shown: bool) -> Iterator[None]:
    """Bound the silence of a server, keep torchvision's words off standard output, leave no folder without data."""
    was_there, limit = root.exists(), socket.getdefaulttimeout()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        if not shown:
            silent = io.StringIO()
            stack.enter_context(redirect_stdout(silent))
            stack.enter_context(redirect_stderr(silent))
        stack.callback(socket.setdefaulttimeout, limit)
        socket.setdefaulttimeout(SILENCE_LIMIT_S)
        try:
            yield
        except BaseException:
            if not was_there:
                shutil.rmtree(root, ignore_errors=True)
            raise


def _class_names(dataset: object, count: int) -> tuple[str, ...]:
    """Names of the labels 0, 1, ..., or their numbers where the data set has no names that fit."""
    for attribute in ("classes", "categories"):
        names = getattr(dataset, attribute, None)
        if isinstance(names, Sequence) and len(names) >= count:
            return tuple(one if isinstance(one, str) else ", ".join(map(str, one)) for one in names)
    return tuple(map(str, range(count)))


def _is_class(label: object) -> bool:
    return isinstance(label, numbers.Integral) and int(label) >= 0


def _line(error: BaseException) -> str:
    """What an error says in one line, without a full stop."""
    said = " ".join(str(error).split()) or type(error).__name__
    return shorten(said, _LONGEST_REASON, placeholder=" ...").rstrip(".: ")
