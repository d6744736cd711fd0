from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch

from pipeline.errors import InputError
from pipeline.networks import STUDY_NETWORKS, check_name, network


def test_study_network_is_two_convolutions_with_relu_and_pooling_and_one_dense_layer():
    model = network("4:6")
    assert list(dict(model.named_children())) == [
        "conv1",
        "relu1",
        "pool1",
        "conv2",
        "relu2",
        "pool2",
        "flatten",
        "dense",
    ]
    assert model.conv1.weight.shape == (4, 3, 5, 5)
    assert model.conv2.weight.shape == (6, 4, 5, 5)
    assert model.dense.weight.shape == (10, 6 * 5 * 5)
    assert model.training


@pytest.mark.parametrize(("image_shape", "classes"), [((3, 32, 32), 10), ((1, 16, 16), 2), ((3, 17, 40), 3)], ids=str)
def test_study_network_gives_one_row_of_scores_per_image(image_shape, classes):
    scores = network("3:5", classes=classes, image_shape=image_shape)(torch.zeros(4, *image_shape))
    assert scores.shape == (4, classes)


def test_every_network_of_the_study_can_be_built():
    for name in STUDY_NETWORKS:
        widths = tuple(map(int, name.split(":")))
        model = network(name)
        assert (model.conv1.out_channels, model.conv2.out_channels) == widths


@pytest.mark.parametrize("name", ["3:5", "squeezenet1_1"])
def test_weights_depend_on_the_seed_and_on_nothing_else(name):
    torch.manual_seed(1)
    first = network(name, seed=7).state_dict()
    torch.manual_seed(2)
    again, other = network(name, seed=7).state_dict(), network(name, seed=8).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_building_a_network_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    network("3:5")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("name", "image_size"),
    [("resnet18", 32), ("regnet_x_400mf", 32), ("googlenet", 64), ("vit_b_32", 32)],
)
def test_torchvision_network_takes_small_images_and_trains(name, image_size):
    model = network(name, classes=7, image_shape=(3, image_size, image_size))
    assert model.training
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert model(torch.zeros(2, 3, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("resnet", {}, r"Network 'resnet' is unknown: .*K1:K2.*did you mean 'resnet\d+'"),
        ("50x500", {}, r"Network '50x500' is unknown: .*such as resnet18"),
        ("fasterrcnn_resnet50_fpn", {}, "is unknown"),
        ("0:500", {}, "Network '0:500' has a convolution without kernels"),
        ("50:-1", {}, "both widths must be at least 1"),
        ("3:5", {"image_shape": (3, 15, 32)}, "cannot take images of shape 3x15x32 .* at least 16x16 pixels"),
        ("3:5", {"classes": 0}, "0 classes"),
        ("alexnet", {}, "Network 'alexnet' cannot take images of shape 3x32x32 .*too small"),
        ("resnet18", {"image_shape": (1, 32, 32)}, "cannot take images of shape 1x32x32 .*channels"),
        ("vit_b_16", {"image_shape": (3, 30, 30)}, "cannot take images of shape 3x30x30"),
    ],
)
def test_what_cannot_be_built_is_one_clear_sentence(name, options, sentence):
    with pytest.raises(InputError, match=sentence) as raised:
        network(name, **options)
    assert "\n" not in str(raised.value)


def test_name_can_be_checked_without_building_the_network():
    for name in (*STUDY_NETWORKS, "resnet18"):
        check_name(name)
    for name, sentence in (("0:5", "without kernels"), ("resnet", "is unknown"), ("", "is unknown")):
        with pytest.raises(InputError, match=sentence):
            check_name(name)


def test_torchvision_model_can_be_unpickled_in_a_process_that_only_made_torchvision_importable(tmp_path):
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps(network("squeezenet1_1")))
    script = (
        "import pickle, sys\n"
        "from pipeline._torchvision import make_importable\n"
        "make_importable(); make_importable()\n"
        "print(type(pickle.load(open(sys.argv[1], 'rb'))).__name__)\n"
        "import torchvision.datasets, torchvision.transforms.v2\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "SqueezeNet\n"), done.stderr
