"""Networks by `package.module:factory`: found from the current folder, checked, refused in one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.config import load_config
from pipeline.errors import InputError
from pipeline.networks import check_name, network

MODULE = '''
import torch
from torch import nn


def tiny(num_classes=10):
    """A network whose outputs are the classes of the data."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def needs_classes(classes):
    return tiny(classes)


def fixed():
    return tiny(5)


def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(5))


class Net(nn.Module):
    def __init__(self, num_classes=10, *extra, width=4, **options):
        super().__init__()
        self.body = tiny(num_classes)
        self.noise = nn.Dropout(0.5)

    def forward(self, x):
        if x.sum() == 0:  # what the meta device cannot tell
            x = x + torch.ones(1)
        return {"scores": self.body(self.noise(x))}


class Holder:
    make = staticmethod(tiny)


ready = tiny()
number = 3


def needs_more(width, num_classes, depth):
    return tiny()


def fails():
    raise OSError("no such file: weights.bin\\nmore")


def gives_text():
    return "resnet18"


def untrained():
    return nn.Flatten()


def large_only(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 99), nn.Flatten(), nn.Linear(4, num_classes))


def flat():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0))
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with modules in it that are forgotten again."""
    (tmp_path / "own_nets.py").write_text(MODULE)
    (tmp_path / "own_package" / "nets").mkdir(parents=True)
    (tmp_path / "own_package" / "nets" / "small.py").write_text("from own_nets import tiny")
    (tmp_path / "own_broken.py").write_text("import not_there_at_all")
    (tmp_path / "own_script.py").write_text("raise SystemExit('usage: own_script FILE')")
    (tmp_path / "own_typo.py").write_text("def tiny(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["tiny", "needs_classes", "fixed", "lazy", "Holder.make"], ids="own_nets:{}".format)
def test_a_factory_of_the_current_folder_gives_a_network_for_the_classes(name: str) -> None:
    model = network(f"own_nets:{name}", classes=5, image_shape=(3, 8, 8))
    assert model.training
    assert model(torch.zeros(4, 3, 8, 8)).shape == (4, 5)


def test_a_class_with_further_options_and_an_output_of_several_tensors_is_a_factory() -> None:
    assert network("own_nets:Net", classes=3)(torch.zeros(2, 3, 8, 8))["scores"].shape == (2, 3)


def test_modules_of_packages_and_installed_ones_are_found() -> None:
    check_name("own_package.nets.small:tiny")
    assert network("torchvision.models:squeezenet1_1", image_shape=(3, 64, 64)) is not None


def test_more_scores_than_classes_are_no_fault() -> None:
    assert network("own_nets:fixed", classes=2)(torch.zeros(1, 3, 8, 8)).shape == (1, 5)


def test_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (network("own_nets:tiny", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_the_trial_leaves_the_weights_and_the_path_of_imports_once() -> None:
    network("own_nets:tiny")
    network("own_nets:fixed", classes=5)
    assert sys.path.count(os.getcwd()) == 1  # noqa: PTH109 - as it stands in the path


REFUSED = {
    "a module that is not there": ("own_net:tiny", "there is no module own_net in"),
    "a file instead of a module": ("own_nets.py:tiny", "write own_nets:tiny"),
    "a package that is not there": ("nowhere.own_nets:tiny", "there is no module nowhere in"),
    "a module that imports what is missing": ("own_broken:tiny", "importing own_broken fails: .*not_there_at_all"),
    "a module that ends the process": ("own_script:tiny", "importing own_script fails: SystemExit: usage"),
    "a module with a typing error": ("own_typo:tiny", "importing own_typo fails: SyntaxError"),
    "no such attribute": ("own_nets:tony", "own_nets has no 'tony'"),
    "no callable": ("own_nets:number", "is of type int: give a function"),
    "a module instead of a factory": ("own_nets:ready", "is of type Sequential: give a function"),
    "further arguments": ("own_nets:needs_more", "needs the argument width, depth: give a function"),
    "a factory that raises": ("own_nets:fails", "cannot be built: OSError: no such file: weights.bin"),
    "no torch module": ("own_nets:gives_text", "returns str instead of a torch.nn.Module"),
    "nothing to train": ("own_nets:untrained", "has no parameters to train"),
    "images that are too small": ("own_nets:large_only", "cannot take images of shape 3x32x32 .*Kernel size"),
    "too few scores": ("own_nets:fixed", r"shape \(2, 5\) for two images, but the data have 10 classes"),
    "no row for each image": ("own_nets:flat", "it must give at least one score for each class"),
}


@pytest.mark.parametrize(("name", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_used_is_one_clear_sentence(name: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        network(name)
    assert f"'{name}'" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_study_may_name_a_factory() -> None:
    assert load_config({"accuracy": {"network": "own_nets:tiny"}}).accuracy.network == "own_nets:tiny"
    with pytest.raises(InputError, match="own_nets has no 'tony'"):
        load_config({"accuracy": {"network": "own_nets:tony"}})
