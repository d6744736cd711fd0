"""Digits and folders of images, and the prepared store that every job reads."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from torch.utils.data import DataLoader
from zarr.storage import ZipStore

from pipeline import datasets, image_sources
from pipeline.datasets import load, prepare
from pipeline.errors import InputError
from pipeline.stored_images import StoredImages


def write_image(path, color=(10, 20, 30), size=(8, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def write_classes(folder, *, per_class=5, classes=("cat", "dog"), first_value=0, size=(8, 6)):
    """Images whose red value is their number and whose green value is their class."""
    for label, name in enumerate(classes):
        for number in range(per_class):
            write_image(folder / name / f"{number}.png", (first_value + number, 100 * label, 0), size)
    return folder


def reds(images):
    return sorted(images.images_NCHW[:, 0, 0, 0].tolist())


# Digits


def test_digits_are_enlarged_grey_images_with_a_stratified_split():
    images = load("digits", root="unused")
    assert (images.name, images.source, images.warning) == ("digits (scikit-learn)", "scikit-learn", None)
    assert images.image_shape == (3, 32, 32)
    assert images.classes == tuple("0123456789")
    assert len(images.train) + len(images.test) == 1797
    assert (images.train.images_NCHW == images.train.images_NCHW[:, :1]).all()
    assert images.train.images_NCHW.max() == 255
    share = np.bincount(images.test.labels_N) / np.bincount(np.r_[images.train.labels_N, images.test.labels_N])
    np.testing.assert_allclose(share, 0.2, atol=0.003)


def test_split_of_the_digits_depends_on_the_seed_alone():
    first, again, other = (load("digits", root="unused", seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train.images_NCHW, again.train.images_NCHW)
    assert (first.test.labels_N != other.test.labels_N).any()


def test_samples_are_normalised_by_the_training_images():
    images = load("digits", root="unused", image_size=8)
    x_NCHW, _ = images.train.batch(range(len(images.train)))
    assert x_NCHW.dtype == torch.float32
    torch.testing.assert_close(x_NCHW.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x_NCHW.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    pixel = images.test.images_NCHW[3, 1, 4, 5]
    x_CHW, label = images.test[3]
    assert x_CHW[1, 4, 5].item() == pytest.approx(
        (pixel / 255 - images.test.mean_C[1]) / images.test.std_C[1], abs=1e-5
    )
    assert label == images.test.labels_N[3]


def test_constant_channel_is_only_shifted(tmp_path):
    images = load(write_classes(tmp_path), root="unused")
    x_NCHW, _ = images.train.batch([0, 1])
    assert (x_NCHW[:, 2] == 0).all()


# Folders of images


def test_folder_with_train_and_test_keeps_them_apart(tmp_path):
    folder = tmp_path / "pets"
    write_classes(folder / "train", per_class=6)
    write_classes(folder / "test", per_class=2, first_value=50)
    images = load(folder, root="unused")
    assert (images.name, images.source) == ("folder pets", str(folder))
    assert images.classes == ("cat", "dog")
    assert images.image_shape == (3, 6, 8)
    assert reds(images.train) == sorted([*range(6)] * 2)
    assert reds(images.test) == [50, 50, 51, 51]
    assert (images.train.images_NCHW[:, 1, 0, 0] == 100 * images.train.labels_N).all()


@pytest.mark.parametrize("layout", ["one folder", "train and test"])
def test_first_images_of_a_folder_are_a_sample_of_all_classes(tmp_path, layout):
    for name in [""] if layout == "one folder" else ["train", "test"]:
        write_classes(tmp_path / name, per_class=40)
    images = load(tmp_path, root="unused")
    for split in (images.train, images.test):
        assert 4 <= split.labels_N[:14].sum() <= 10


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_other_names_of_the_test_folder_are_understood(tmp_path, name):
    write_classes(tmp_path / "train", per_class=2)
    write_classes(tmp_path / name, per_class=1, first_value=50)
    assert reds(load(tmp_path, root="unused").test) == [50, 50]


def test_folder_without_test_images_is_split_by_class_and_seed(tmp_path):
    write_classes(tmp_path, per_class=10)
    first, again, other = (load(tmp_path, root="unused", seed=seed) for seed in (0, 0, 1))
    assert np.bincount(first.train.labels_N).tolist() == [8, 8]
    assert np.bincount(first.test.labels_N).tolist() == [2, 2]
    assert sorted(reds(first.train) + reds(first.test)) == sorted([*range(10)] * 2)
    np.testing.assert_array_equal(first.train.images_NCHW, again.train.images_NCHW)
    assert (first.train.images_NCHW[:, 0] != other.train.images_NCHW[:, 0]).any()


def test_class_named_train_is_a_class_like_any_other(tmp_path):
    assert load(write_classes(tmp_path, classes=("car", "train")), root="unused").classes == ("car", "train")


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    write_classes(tmp_path)
    write_image(tmp_path / "cat" / "grey.png", 7, mode="L")
    write_image(tmp_path / "cat" / "transparent.png", (7, 7, 7, 9), mode="RGBA")
    Image.new("RGB", (8, 6), (7, 7, 7)).quantize(4).save(tmp_path / "dog" / "palette.png")
    images = load(tmp_path, root="unused")
    assert (reds(images.train) + reds(images.test)).count(7) == 3


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    write_classes(tmp_path)
    frames = [Image.new("RGB", (8, 6), (value, 0, 0)) for value in (70, 80, 90)]
    frames[0].save(tmp_path / "cat" / "moving.gif", save_all=True, append_images=frames[1:])
    images = load(tmp_path, root="unused")
    found = reds(images.train) + reds(images.test)
    assert (found.count(70), found.count(80)) == (1, 0)


def test_hidden_files_and_folders_are_no_images(tmp_path):
    write_classes(tmp_path)
    (tmp_path / "cat" / "._0.png").write_text("left by another system")
    (tmp_path / ".cache").mkdir()
    images = load(tmp_path, root="unused")
    assert images.classes == ("cat", "dog")
    assert len(images.train) + len(images.test) == 10


@pytest.mark.parametrize("image_size", [12, (12, 20), [12, 20]], ids=str)
def test_images_of_different_sizes_are_resized_on_request(tmp_path, image_size):
    write_classes(tmp_path)
    write_image(tmp_path / "cat" / "large.jpg", (200, 0, 0), size=(300, 200))
    images = load(tmp_path, root="unused", image_size=image_size)
    assert images.image_shape == (3, 12, 12 if image_size == 12 else 20)
    assert max(reds(images.train) + reds(images.test)) == pytest.approx(200, abs=3)


def missing(folder):
    return folder / "nowhere"


def empty(folder):
    folder.mkdir(exist_ok=True)
    return folder


def images_without_class_folders(folder):
    write_image(folder / "0.png")
    return folder


def single_class(folder):
    return write_classes(folder, classes=("cat",))


def class_without_images(folder):
    write_classes(folder)
    (folder / "eel").mkdir()
    return folder


def file_that_is_no_image(folder):
    write_classes(folder)
    (folder / "cat" / "notes.txt").write_text("no image")
    return folder


def image_beside_the_classes(folder):
    write_classes(folder)
    write_image(folder / "astray.png")
    return folder


def sixteen_bit_colours(folder):
    write_classes(folder)
    (folder / "dog" / "deep.ppm").write_bytes(b"P6 8 6 65535\n" + bytes(8 * 6 * 6))
    return folder


def several_pages(folder):
    write_classes(folder)
    pages = [Image.new("L", (8, 6), value) for value in range(5)]
    pages[0].save(folder / "dog" / "stack.tif", save_all=True, append_images=pages[1:])
    return folder


def class_with_one_image(folder):
    write_classes(folder)
    write_image(folder / "eel" / "0.png")
    return folder


def train_without_test(folder):
    write_classes(folder / "train")
    return folder


def test_class_that_train_lacks(folder):
    write_classes(folder / "train")
    write_classes(folder / "test", classes=("cat", "eel"))
    return folder


test_class_that_train_lacks.__test__ = False


def empty_test(folder):
    write_classes(folder / "train")
    (folder / "test").mkdir()
    return folder


def not_an_image(folder):
    write_classes(folder)
    (folder / "dog" / "bad.jpg").write_text("no image")
    return folder


def truncated_image(folder):
    write_classes(folder)
    whole = io.BytesIO()
    Image.effect_noise((8, 6), 50).save(whole, "JPEG")
    (folder / "dog" / "bad.jpg").write_bytes(whole.getvalue()[:-30])
    return folder


def damaged_png(folder):
    write_classes(folder)
    content = bytearray((folder / "dog" / "0.png").read_bytes())
    content[45] ^= 0xFF
    (folder / "dog" / "bad.png").write_bytes(content)
    return folder


def sixteen_bits(folder):
    write_classes(folder)
    Image.fromarray(np.full((6, 8), 40_000, np.uint16)).save(folder / "dog" / "deep.png")
    return folder


def different_sizes(folder):
    write_classes(folder)
    write_image(folder / "dog" / "wide.png", size=(9, 6))
    return folder


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (missing, "Data '.*nowhere' is not a folder that exists: give 'auto', 'cifar10', 'digits', the path"),
        (empty, "has no class folders: put each of at least two classes into its own folder"),
        (images_without_class_folders, "has no class folders"),
        (single_class, "has only the class folder 'cat'"),
        (class_without_images, "eel holds no images"),
        (class_with_one_image, "Class 'eel' has 1 image: it needs at least 2"),
        (train_without_test, "has train/ but no test/"),
        (test_class_that_train_lacks, "eel is a class that .*train lacks"),
        (empty_test, "test holds no images in class folders"),
        (not_an_image, r"Image .*dog/bad\.jpg cannot be read: it is not an image"),
        (truncated_image, r"Image .*dog/bad\.jpg cannot be read \(.*truncated.*\)"),
        (damaged_png, r"Image .*dog/bad\.png cannot be read"),
        (file_that_is_no_image, r"Image .*cat/notes\.txt cannot be read: it is not an image"),
        (image_beside_the_classes, r"Image .*astray\.png lies beside the class folders"),
        (sixteen_bit_colours, r"Image .*dog/deep\.ppm has more than 8 bits per channel"),
        (several_pages, r"Image .*dog/stack\.tif has 5 pages"),
        (sixteen_bits, r"Image .*dog/deep\.png has more than 8 bits per channel"),
        (different_sizes, r"dog/wide\.png is 9x6 pixels, .*cat/0\.png is 8x6; set image_size"),
    ],
)
def test_what_is_no_folder_of_images_is_one_clear_sentence(tmp_path, build, sentence):
    with pytest.raises(InputError, match=sentence) as raised:
        load(build(tmp_path / "data"), root="unused")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_size": 0}, "image_size of 0 is too small"),
        ({"image_size": (8, -1)}, "image_size of .* is too small"),
        ({"test_fraction": 1.0}, "test fraction of 1.0"),
        ({"test_fraction": 0}, "test fraction of 0 "),
    ],
)
def test_impossible_options_are_one_clear_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence):
        load("digits", root="unused", **options)


def test_images_beyond_the_free_memory_are_refused_before_reading(tmp_path, monkeypatch):
    class FourKilobytes:
        available = 4096

    monkeypatch.setattr(image_sources.psutil, "virtual_memory", FourKilobytes)
    with pytest.raises(InputError, match=r"The 10 images .* at 100x100 pixels need .* GiB .* smaller image_size"):
        load(write_classes(tmp_path), root="unused", image_size=100)


# The prepared store


@pytest.fixture
def prepared(tmp_path):
    path = tmp_path / "prepared" / "images.zarr.zip"
    return path, prepare(write_classes(tmp_path / "pets", per_class=10), path, root="unused")


@pytest.mark.parametrize("split", ["train", "test"])
def test_stored_images_are_those_that_were_loaded(prepared, split):
    path, images = prepared
    stored, loaded = StoredImages(path, split), getattr(images, split)
    assert (stored.classes, stored.image_shape, stored.source_name) == (("cat", "dog"), (3, 6, 8), "folder pets")
    assert len(stored) == len(loaded)
    for (x, y), (expected_x, expected_y) in zip(stored, loaded, strict=True):
        torch.testing.assert_close(x, expected_x, rtol=0, atol=0)
        assert y == expected_y


def test_stored_images_travel_as_their_path_even_after_use(prepared, monkeypatch, tmp_path):
    path, _ = prepared
    monkeypatch.chdir(path.parent)
    stored = StoredImages(path.name, "train")
    expected, _ = stored[3]
    monkeypatch.chdir(tmp_path)
    message = pickle.dumps(stored)
    assert len(message) < 1000
    torch.testing.assert_close(pickle.loads(message)[3][0], expected)


def test_batches_of_any_kind_of_index_agree_with_single_samples(prepared):
    stored = StoredImages(prepared[0], "train")
    x_NCHW, y_N = stored.batch([4, 1])
    assert (x_NCHW.shape, x_NCHW.dtype, y_N.dtype) == ((2, 3, 6, 8), torch.float32, torch.int64)
    for indices in (torch.tensor([4, 1]), np.array([4, 1])):
        assert torch.equal(stored.batch(indices)[0], x_NCHW)
    assert torch.equal(stored[4][0], x_NCHW[0])
    loaded_x, loaded_y = next(iter(DataLoader(stored, batch_size=2, sampler=[4, 1])))
    assert torch.equal(loaded_x, x_NCHW)
    assert torch.equal(loaded_y, y_N)
    with pytest.raises(IndexError):
        stored[len(stored)]


def test_stored_images_in_grey_have_one_channel_that_is_normalised_as_such(prepared):
    path, images = prepared
    stored = pickle.loads(pickle.dumps(StoredImages(path, "train").in_grey()))
    assert stored.image_shape == (1, 6, 8)
    x_NCHW, _ = stored.batch(range(len(stored)))
    assert x_NCHW.shape == (len(stored), 1, 6, 8)
    assert abs(float(x_NCHW.mean())) < 1e-5
    assert float(x_NCHW.std(correction=0)) == pytest.approx(1, abs=1e-5)
    expected = np.asarray(Image.fromarray(images.train.images_NCHW[3].transpose(1, 2, 0)).convert("L"))
    np.testing.assert_array_equal(stored._arrays.images_NCHW[3, 0], expected)


def test_limit_takes_the_first_images(prepared):
    path, images = prepared
    assert len(StoredImages(path, "train", limit=5)) == 5
    assert len(StoredImages(path, "train", limit=500)) == len(images.train)
    limited = StoredImages(path, "train", limit=5)
    assert [y for _, y in limited] == images.train.labels_N[:5].tolist()


def test_every_variable_of_the_store_is_labelled_and_the_store_says_where_it_comes_from(prepared):
    with ZipStore(prepared[0], mode="r") as zipped, xr.open_zarr(zipped, consolidated=False, chunks=None) as store:
        assert all({"units", "long_name"} <= set(variable.attrs) for variable in store.variables.values())
        assert store.attrs["data"] == "folder pets"
        assert store.attrs["warning"] == ""
        assert {"versions", "configuration", "created", "code_version", "source"} <= set(store.attrs)


def test_failed_preparation_leaves_nothing_behind(tmp_path):
    path = tmp_path / "out" / "images.zarr.zip"
    with pytest.raises(InputError):
        prepare(not_an_image(tmp_path / "data"), path, root="unused")
    assert not path.parent.exists()


def test_what_is_no_prepared_store_is_one_clear_sentence(tmp_path, prepared):
    path, _ = prepared
    text = tmp_path / "text.zip"
    text.write_text("no zip")
    other = tmp_path / "other.zarr.zip"
    datasets.write_zip(xr.Dataset({"step_time": ("repetition", [1.0])}), other)
    for wrong, sentence in (
        (tmp_path / "nowhere.zip", "nowhere.zip do not exist: prepare them first"),
        (text, "text.zip is not a store of prepared images"),
        (other, "other.zarr.zip is not a store of prepared images"),
    ):
        with pytest.raises(InputError, match=sentence):
            StoredImages(wrong, "train")
    with pytest.raises(InputError, match="limit of 0 images"):
        StoredImages(path, "train", limit=0)
    with pytest.raises(InputError, match="Split 'val' is unknown"):
        StoredImages(path, "val")
