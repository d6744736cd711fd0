"""Images are classified as in a training's validation, and what cannot be is refused in one sentence."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import pipeline
from pipeline.analysis.confusion_figure import confusion_figure
from pipeline.checkpoint import Description, read_weights, write_weights
from pipeline.cli import main
from pipeline.datasets import prepare
from pipeline.errors import InputError
from pipeline.inference import evaluate, image_files, predict
from pipeline.networks import network
from pipeline.stored_images import StoredImages

COLOURS = ("blue", "green", "red")
SIZE = 20


def painted(path: Path, channel: int, random: np.random.Generator, size: tuple[int, int]) -> None:
    pixels = random.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:, :, channel] += 80
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes, of several sizes, split into train/ and test/."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4)):
        for label, colour in enumerate(COLOURS):
            for number in range(count):
                painted(root / split / colour / f"{number}.png", 2 - label, random, (24 + number, 30 - number))
    return root


@pytest.fixture(scope="module")
def prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "images.zarr.zip"
    prepare(folder, path, root=path.parent, image_size=SIZE, progress=False)
    return path


@pytest.fixture(scope="module", params=["weights.safetensors", "weights.pt"])
def weights(request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as `train` writes them, of a network that was not trained."""
    path: Path = tmp_path_factory.mktemp("weights") / request.param
    write_weights(net().state_dict(), path, Description.of(StoredImages(prepared, "train"), "3:5"))
    return path


def net() -> nn.Module:
    return network("3:5", classes=3, image_shape=(3, SIZE, SIZE), seed=3)


def expected(images: StoredImages) -> torch.Tensor:
    """What the network gives for the images as a training has them."""
    with torch.no_grad():
        found: torch.Tensor = net().eval()(images.batch(range(len(images)))[0])
    return found


def test_weights_carry_what_they_belong_to(weights: Path, prepared: Path) -> None:
    state, said = read_weights(weights)
    images = StoredImages(prepared, "train")
    assert set(state) == set(net().state_dict())
    assert said == Description(
        network="3:5", classes=COLOURS, image_shape=(3, SIZE, SIZE), resized=True,
        mean=tuple(images.normalisation[0]), std=tuple(images.normalisation[1]), version=said.version,
    )  # fmt: skip
    assert said.version


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_files_are_prepared_as_the_images_of_a_validation(
    weights: Path, folder: Path, prepared: Path, batch_size: int
) -> None:
    found = predict(folder / "test", weights, batch_size=batch_size, device="cpu")
    assert list(found["class"].values) == list(COLOURS)
    assert list(found.image.values) == [str(path) for path in sorted((folder / "test").rglob("*.png"))]
    # The test images of a store lie in random order: the same rows, whatever their order.
    wanted = F.softmax(expected(StoredImages(prepared, "test")), dim=1).numpy()
    rows = found.probability.values
    torch.testing.assert_close(
        torch.tensor(rows[rows[:, 0].argsort()]), torch.tensor(wanted[wanted[:, 0].argsort()]), rtol=1e-5, atol=1e-6
    )
    assert list(found.predicted.values) == [COLOURS[place] for place in rows.argmax(1)]


def test_pictures_of_one_channel_are_made_grey_as_in_a_training(prepared: Path, folder: Path, tmp_path: Path) -> None:
    images = StoredImages(prepared, "test").in_grey()
    model = network("3:5", classes=3, image_shape=(1, SIZE, SIZE), seed=1)
    path = tmp_path / "grey.safetensors"
    write_weights(model.state_dict(), path, Description.of(images, "3:5"))
    with torch.no_grad():
        wanted = F.softmax(model.eval()(images.batch(range(len(images)))[0]), dim=1)
    found = torch.tensor(predict(folder / "test", path, device="cpu").probability.values)
    torch.testing.assert_close(found.sort(dim=0).values, wanted.sort(dim=0).values, rtol=1e-5, atol=1e-6)


def test_an_evaluation_counts_what_the_network_says(weights: Path, folder: Path, prepared: Path) -> None:
    images = StoredImages(prepared, "test")
    scores, labels = expected(images), images.batch(range(len(images)))[1]
    for data in (folder, prepared):
        found = evaluate(data, weights, batch_size=5, device="cpu")
        assert float(found.accuracy) == pytest.approx(float((scores.argmax(1) == labels).float().mean()))
        assert float(found.loss) == pytest.approx(float(F.cross_entropy(scores, labels)), rel=1e-5)
        counts = torch.zeros(3, 3, dtype=torch.int64).index_put((labels, scores.argmax(1)), torch.tensor(1), True)
        assert found.confusion.values.tolist() == counts.tolist()
    assert int(evaluate(folder, weights, split="all", device="cpu").confusion.sum()) == 30
    assert int(evaluate(folder, weights, split="train", device="cpu").confusion.sum()) == 18


def test_classes_go_by_their_names_and_not_by_their_order(weights: Path, prepared: Path) -> None:
    turned = ["red", "green", "blue"]
    wanted = evaluate(prepared, weights, device="cpu").confusion.values
    found = evaluate(prepared, weights, classes=turned, device="cpu").confusion
    # The same answers by position; rows are the data's classes by name.
    assert (found.values == wanted[[2, 1, 0]]).all()
    with pytest.raises(InputError, match="a class 'red' that the weights do not know"):
        evaluate(prepared, weights, classes=["blue", "green", "yellow"], device="cpu")


def test_predictions_are_written_as_csv_or_json(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["predict", str(folder / "test"), "--weights", str(weights), "--device", "cpu"]
    found = predict(folder / "test", weights, device="cpu")
    assert main(given) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["image"] for row in rows] == list(found.image.values)
    assert [row["class"] for row in rows] == list(found.predicted.values)
    assert [float(row["probability"]) for row in rows] == pytest.approx(found.probability.max("class").values, abs=1e-6)
    assert main([*given, "--output", str(tmp_path / "told.json"), "--top", "3"]) == 0
    told = json.loads((tmp_path / "told.json").read_text())
    assert len(told) == 3 * len(rows)
    assert sum(one["probability"] for one in told[:3]) == pytest.approx(1, abs=1e-5)
    assert [one["class"] for one in told[::3]] == list(found.predicted.values)
    assert [path.name for path in tmp_path.iterdir()] == ["told.json"]


def test_an_evaluation_is_written_as_numbers_table_and_picture(
    weights: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["evaluate", "--data", str(prepared), "--weights", str(weights), "--device", "cpu"]
    assert main([*given, "--output", str(tmp_path / "told")]) == 0
    found = evaluate(prepared, weights, device="cpu")
    said = capsys.readouterr().out
    assert f"12 images, accuracy {100 * float(found.accuracy):.1f} %" in said
    assert all(name in said for name in (*COLOURS, "recall", "precision"))
    metrics = json.loads((tmp_path / "told" / "metrics.json").read_text())
    assert (metrics["accuracy"], metrics["images"]) == (pytest.approx(float(found.accuracy)), 12)
    table = list(csv.reader((tmp_path / "told" / "confusion.csv").read_text().splitlines()))
    assert [[int(count) for count in row[1:]] for row in table[1:]] == found.confusion.values.tolist()
    with Image.open(tmp_path / "told" / "confusion.png") as picture:
        assert min(picture.size) > 300


def test_a_class_may_be_called_nan_and_one_never_told_has_no_precision(
    weights: Path, prepared: Path, tmp_path: Path
) -> None:
    state, said = read_weights(weights)
    path = tmp_path / "named.safetensors"
    names = (*COLOURS, "NaN")
    model = network("3:5", classes=4, image_shape=(3, SIZE, SIZE), seed=3)
    bias = next(name for name in reversed(model.state_dict()) if name.endswith("bias"))
    state = {**model.state_dict(), bias: torch.tensor([0.0, 0.0, 0.0, -1e6])}
    write_weights(state, path, replace(said, classes=names))
    assert main(["evaluate", "--data", str(prepared), "--weights", str(path), "--output", str(tmp_path / "told")]) == 0
    metrics = json.loads((tmp_path / "told" / "metrics.json").read_text())
    assert metrics["classes"]["NaN"] == {"recall": None, "precision": None}


@pytest.mark.parametrize("use", [predict, evaluate])
def test_a_batch_of_no_images_is_refused(use: Callable[..., object], weights: Path, prepared: Path) -> None:
    with pytest.raises(InputError, match="a batch of 0 images is too small"):
        use(prepared, weights, batch_size=0)


def test_the_figure_shows_each_count(weights: Path, prepared: Path) -> None:
    found = evaluate(prepared, weights, device="cpu")
    axis = confusion_figure(found).axes[0]
    assert [int(text.get_text()) for text in axis.texts] == found.confusion.values.ravel().tolist()
    assert [label.get_text() for label in axis.get_yticklabels()] == list(COLOURS)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What standard error says of a command that ends with exit code 2: a single line, and nothing on the other."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


class TestRefusals:
    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        """Pictures, and what is none."""
        painted(tmp_path / "good.png", 0, np.random.default_rng(0), (SIZE, SIZE))
        (tmp_path / "notes.txt").write_text("no picture")
        (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
        (tmp_path / "empty").mkdir()
        (tmp_path / "mixed").mkdir()
        (tmp_path / "mixed" / "a.png").write_bytes((tmp_path / "good.png").read_bytes())
        (tmp_path / "mixed" / "b.txt").write_text("no picture")
        return tmp_path

    @pytest.mark.parametrize(
        ("images", "says"),
        [
            (["notes.txt"], "notes.txt cannot be read: it is not an image"),
            (["good.png", "broken.png"], "broken.png cannot be read"),
            (["empty"], "empty holds no images"),
            (["mixed"], "b.txt cannot be read: it is not an image"),
            (["nowhere.png"], "nowhere.png does not exist"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_what_is_no_image_is_named_and_nothing_is_written(
        self, images: list[str], says: str, place: Path, weights: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = sorted(place.iterdir())
        paths = [place / image for image in images]
        given = ["--weights", weights, "--device", "cpu", "--batch-size", "1"]
        assert says in refused(capsys, "predict", *paths, *given, "--output", place / "out.csv")
        assert says in refused(capsys, "predict", *paths, *given)
        assert sorted(place.iterdir()) == before

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            (["--weights", "none.pt"], "weights 'none.pt' do not exist"),
            (["--weights", "notes.txt"], "weights 'notes.txt' cannot be read"),
            (["--weights", "bad.safetensors"], "weights 'bad.safetensors' cannot be read"),
            (["--weights", "plain.pt"], "do not say their network, classes, image_size, mean, std"),
            (["--weights", "plain.pt", "--network", "3:5", "--classes", "a,b,c"], "their image_size, mean, std"),
            (["--weights", "full.pt", "--network", "4:9"], "do not fit the network 4:9"),
            (["--weights", "full.pt", "--output", "no/where.csv"], "output 'no/where.csv' cannot be written"),
            (["--weights", "full.pt", "--output", "told.xls"], "format 'xls' is unknown: give csv or json"),
            (["--weights", "full.pt", "--mean", "0.5"], "mean has 1 values, but the images have 3 channels"),
            (["--weights", "full.pt", "--mean", "half"], "--mean 'half' are not numbers"),
            (["--weights", "full.pt", "--device", "abacus"], "device 'abacus' cannot be used"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_weights_that_do_not_do_are_told_in_a_sentence(
        self,
        given: list[str],
        says: str,
        place: Path,
        prepared: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(place)
        torch.save(net().state_dict(), "plain.pt")
        write_weights(net().state_dict(), Path("full.pt"), Description.of(StoredImages(prepared, "train"), "3:5"))
        Path("bad.safetensors").write_bytes(b"\x00" * 5)
        assert says in refused(capsys, "predict", "good.png", *given)

    def test_what_plain_weights_lack_can_be_given(self, place: Path, weights: Path, prepared: Path) -> None:
        plain, images = place / "plain.pt", StoredImages(prepared, "train")
        torch.save(net().state_dict(), plain)
        mean, std = (list(map(float, values)) for values in images.normalisation)
        given: dict[str, Any] = {"classes": COLOURS, "image_size": SIZE, "mean": mean, "std": std, "device": "cpu"}
        wanted = predict(place / "good.png", weights, device="cpu").probability.values
        for how in ({"network": "3:5"}, {"model": net()}):
            found = predict(place / "good.png", plain, **given, **how).probability.values
            assert np.allclose(found, wanted, atol=1e-6)

    def test_another_size_is_refused_where_the_training_did_not_resize(
        self, place: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        said = Description.of(StoredImages(prepared, "train"), "3:5")
        path = place / "whole.pt"
        write_weights(net().state_dict(), path, Description(**{**vars(said), "resized": False}))
        painted(place / "large.png", 0, np.random.default_rng(0), (30, 40))
        told = refused(capsys, "predict", place / "good.png", place / "large.png", "--weights", path)
        assert "large.png has 30x40 pixels, but the weights were trained on images of 20x20" in told
        assert predict([place / "large.png"], path, image_size=SIZE, device="cpu").sizes["image"] == 1

    def test_data_of_another_size_are_refused(
        self, place: Path, folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = place / "other.zarr.zip"
        prepare(folder, other, root=place, image_size=18, progress=False)
        told = refused(capsys, "evaluate", "--data", other, "--weights", weights, "--output", place / "told")
        assert "have 18x18 pixels, but the weights were trained on images of 20x20" in told
        assert not (place / "told").exists()


def test_hidden_files_are_left_out_and_folders_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.png", "a.png", ".hidden.png", ".git/x.png"):
        painted(tmp_path / name, 0, np.random.default_rng(0), (4, 4))
    assert [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)] == ["a.png", "b/1.png", "b/2.png"]


def test_classifying_needs_no_dask(weights: Path, folder: Path) -> None:
    program = (
        "import sys; from pipeline.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or ('distributed' in sys.modules))"
    )
    command = [sys.executable, "-c", program, "predict", str(folder / "test"), "--weights", str(weights)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_public_is_listed() -> None:
    assert dir(pipeline) == sorted(pipeline.__all__)
    assert all(getattr(pipeline, name) is not None for name in dir(pipeline))
