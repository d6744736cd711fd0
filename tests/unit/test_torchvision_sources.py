"""Data sets of torchvision by name: their splits, labels and sizes, and one sentence where they cannot be had."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset

from pipeline._torchvision import make_importable
from pipeline.cli.images import prepared_images
from pipeline.datasets import load
from pipeline.errors import InputError

make_importable()
from torchvision import datasets  # noqa: E402 - importable only now


def write_mnist(folder: Path, *, train: int = 12, test: int = 4) -> None:
    """The files of FashionMNIST; every pixel of an image is 10 times its label."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", train), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.repeat(10 * labels, 28 * 28).tobytes()
        head = np.array([2051, count, 28, 28], ">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + images)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + labels.tobytes())


class Small(Dataset[Any]):
    """What a test replaces a data set of torchvision by."""

    classes = ("cat", "dog")
    sizes = ((8, 6),)
    mode = "RGB"

    def __init__(self, root: str) -> None:
        self.root, self.color = root, 1

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return Image.new(self.mode, self.sizes[index % len(self.sizes)], self.color), index % 2


class BySplit(Small):
    """Tells its splits apart by name, and knows no labels of its test images."""

    def __init__(self, root: str, split: str = "train") -> None:
        if split not in ("train", "val", "test"):
            raise ValueError(f"Unknown value '{split}' for argument split.")
        super().__init__(root)
        self.split, self.color = split, {"train": 1, "val": 2, "test": 3}[split]

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image, None if self.split == "test" else label


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace Food101 by a data set of a few images, with some attributes changed."""

    def replace(kind: type[Small], **changes: Any) -> None:
        monkeypatch.setattr(datasets, "Food101", type("Food101", (kind,), changes))

    return replace


def test_grey_images_with_splits_of_their_own_are_repeated_to_three_channels(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    images = load(f"torchvision:FashionMNIST:{tmp_path}", root="unused", progress=False)
    assert (images.name, images.source) == ("FashionMNIST (torchvision)", str(tmp_path))
    assert images.image_shape == (3, 28, 28)
    assert images.classes[:2] == ("T-shirt/top", "Trouser")
    assert (len(images.train), len(images.test)) == (12, 4)
    for part in (images.train, images.test):
        assert (part.images_NCHW == 10 * part.labels_N[:, None, None, None]).all()
    assert sorted(images.test.labels_N) == [0, 1, 2, 3]


def test_the_order_is_random_but_fixed_by_the_seed(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    first, again, other = (
        load("torchvision:FashionMNIST", root=tmp_path, seed=seed, progress=False).train.labels_N.tolist()
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert sorted(first) == sorted(other) != first


def test_a_data_set_without_splits_is_split_by_class() -> None:
    images = load("torchvision:FakeData", root="unused", image_size=8, progress=False)
    assert (len(images.classes), images.image_shape) == (10, (3, 8, 8))
    assert len(images.train) + len(images.test) == 1000
    assert len(images.test) == pytest.approx(200, abs=5)


def test_splits_by_name_are_found_and_one_without_labels_is_passed_over(replaced: Callable[..., None]) -> None:
    replaced(BySplit)
    images = load("torchvision:Food101:anywhere", root="unused", progress=False)
    assert set(images.train.images_NCHW[:, 0].ravel()) == {1}
    assert set(images.test.images_NCHW[:, 0].ravel()) == {2}
    assert images.classes == ("cat", "dog")


def test_images_of_different_sizes_are_resized_on_request(replaced: Callable[..., None]) -> None:
    replaced(Small, sizes=((8, 6), (20, 9)))
    assert load("torchvision:Food101", root="x", image_size=12, progress=False).image_shape == (3, 12, 12)
    with pytest.raises(InputError, match=r"Images differ in size: \d of Food101 is .* set image_size"):
        load("torchvision:Food101", root="x", progress=False)


def test_names_that_do_not_fit_the_labels_give_way_to_numbers(replaced: Callable[..., None]) -> None:
    replaced(Small, classes=("only one",))
    assert load("torchvision:Food101", root="x", progress=False).classes == ("0", "1")


def test_every_command_can_prepare_them(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    with prepared_images(f"torchvision:FashionMNIST:{tmp_path}", train_limit=5) as (train, test):
        assert (len(train), len(test), train.image_shape) == (5, 4, (3, 28, 28))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("torchvision:fashionmnist", "'fashionmnist' of torchvision is unknown: did you mean FashionMNIST?"),
        ("torchvision:", "'' of torchvision is unknown: give one such as FashionMNIST"),
        ("torchvision:Kinetics:x", "needs the argument frames_per_clip, which cannot be given here"),
        ("torchvision:ImageFolder:nowhere", "ImageFolder is not in nowhere and cannot be downloaded"),
    ],
)
def test_what_cannot_be_had_is_one_clear_sentence(data: str, sentence: str) -> None:
    with pytest.raises(InputError) as raised:
        load(data, root="unused", progress=False)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"__getitem__": lambda *_: (1, 2, 3)}, "is none for classification"),
        ({"__getitem__": lambda *_: (Image.new("RGB", (2, 2)), "cat")}, "is none for classification"),
        ({"__getitem__": lambda *_: Image.open("nowhere.jpg")}, "cannot be read .*nowhere.jpg"),
        ({"__len__": lambda _: 0}, "holds no images"),
        ({"mode": "I;16"}, "more than 8 bits per channel"),
    ],
    ids=["no pairs", "no numbers of classes", "a missing file", "no images", "16 bits"],
)
def test_what_is_no_data_set_for_classification_is_refused(
    replaced: Callable[..., None], changes: dict[str, Any], sentence: str
) -> None:
    replaced(Small, **changes)
    with pytest.raises(InputError, match=sentence):
        load("torchvision:Food101", root="x", progress=False)


def test_a_download_that_fails_says_so_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
    with pytest.raises(
        InputError, match=r"FashionMNIST is not in .* and could not be downloaded \(Error downloading .*refused"
    ):
        load(f"torchvision:FashionMNIST:{tmp_path / 'new'}", root="unused", progress=False)
    assert not (tmp_path / "new").exists()
    assert socket.getdefaulttimeout() is None
    assert capsys.readouterr() == ("", "")
