"""The conda environments and pyproject.toml ask for the same software in the same versions."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
KINDS = ("cpu", "gpu")
# Conda's name where it is not the name on PyPI; the extra of `snakemake[reports]` is part of conda's full `snakemake`.
CONDA_NAMES = {"torch": "pytorch-{kind}", "dask": "dask-core", "matplotlib": "matplotlib-base"}


def python_ranges() -> dict[str, SpecifierSet]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    return {"python": SpecifierSet(project["requires-python"])} | {r.name: r.specifier for r in requirements}


def conda_environment(kind: str) -> dict:
    return yaml.safe_load((ROOT / "envs" / f"{kind}.yaml").read_text())


def conda_ranges(kind: str) -> dict[str, SpecifierSet]:
    ranges = {}
    for text in conda_environment(kind)["dependencies"]:
        if isinstance(text, str) and text != "pip":
            name, specifier = re.fullmatch(r"([a-z0-9-]+)(.*)", text).groups()
            ranges[name] = SpecifierSet(specifier)
    return ranges


@pytest.mark.parametrize("kind", KINDS)
def test_conda_environment_has_exactly_the_ranges_of_pyproject(kind):
    expected = {CONDA_NAMES.get(name, name).format(kind=kind): specs for name, specs in python_ranges().items()}
    assert conda_ranges(kind) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_conda_environment_installs_the_package_from_the_checkout_it_lies_in(kind):
    pip_lines = [entry["pip"] for entry in conda_environment(kind)["dependencies"] if isinstance(entry, dict)]
    assert pip_lines == [["--editable .."]]
    assert (ROOT / "envs" / "..").resolve() == ROOT


@pytest.mark.parametrize("name", [name for name in python_ranges() if name != "python"])
def test_range_of_pyproject_holds_the_version_installed_here(name):
    assert python_ranges()[name].contains(version(name), prereleases=True)


def test_torch_and_torchvision_are_pinned_to_releases_that_belong_together():
    ranges = python_ranges()
    (torch,), (torchvision,) = ranges["torch"], ranges["torchvision"]
    assert torch.operator == torchvision.operator == "~="
    torch_minor, torchvision_minor = (int(pin.version.split(".")[1]) for pin in (torch, torchvision))
    assert torchvision_minor - torch_minor == 15, "torchvision 0.(N+15) is built for torch 2.N"
