"""The comparison of learning curves, as the workflow runs it: real trainings, stopped and taken up again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import xarray as xr

import pipeline
from pipeline.accuracy import CONTROL
from pipeline.analysis import learning
from pipeline.cli import main
from pipeline.cluster.devices import parse_device_set
from pipeline.config import STRATEGIES
from pipeline.datasets import prepare
from pipeline.networks import network
from pipeline.results.contracts import validate_accuracy
from pipeline.results.stores import open_store
from pipeline.run.batches import batch_indices
from pipeline.stored_images import StoredImages

ROOT = Path(__file__).resolve().parents[2]
STEPS = 50
DEVICES = "cpu + cpu@0.5"
EARLY = 20
"""Later a network of four kernels may jump: one of them crossing zero by rounding is a quarter of its first layer."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def command(folder: Path, strategies: tuple[str, ...], *options: str) -> list[str]:
    """50 steps of a tiny network on the digits of scikit-learn, seed 0; results in folder/accuracy.zarr."""
    given = ["accuracy", "--network", "4:8", "--devices", DEVICES, "--batch-size", "12"]
    given += ["--train-images", "300", "--epochs", "2", "--test-images", "100", "--seed", "0"]
    given += [part for name in strategies for part in ("--strategy", name)]
    return [*given, "--output", str(folder / "accuracy.zarr"), *options]


def run(folder: Path, strategies: tuple[str, ...], *options: str) -> xr.Dataset:
    assert main(command(folder, strategies, *options)) == 0
    return open_store(folder / "accuracy.zarr", validate_accuracy)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Options: prepared images, a calibration and a running cluster of the devices."""
    folder = tmp_path_factory.mktemp("given")
    images, costs = folder / "digits.zarr.zip", folder / "calibration.zarr.zip"
    prepare("digits", images, root=folder, progress=False)
    with pipeline.local_cluster(parse_device_set(DEVICES), dashboard=False) as client:
        common = ("--data", str(images), "--scheduler", client.scheduler.address)
        calibrate = ["calibrate", "--network", "4:8", "--devices", DEVICES, "--batch-size", "12"]
        assert main([*calibrate, *common, "--output", str(costs)]) == 0
        yield (*common, "--calibration", str(costs))


@pytest.fixture(scope="module")
def compared(given: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    return run(tmp_path_factory.mktemp("all"), STRATEGIES, "--seed", "1", *given)


def test_losses_of_all_strategies_differ_by_no_more_than_rounding_explains(compared: xr.Dataset) -> None:
    assert dict(compared.sizes) == {"seed": 2, "strategy": len(STRATEGIES), "epoch": 2, "step": STEPS}
    apart = learning.loss_difference(compared).isel(step=slice(EARLY))
    assert apart.max() <= learning.rounding_bound(compared, EARLY), apart.max(["seed", "step"])


def test_each_seed_has_its_own_initial_weights_and_order_of_images(compared: xr.Dataset, tmp_path: Path) -> None:
    prepare("digits", tmp_path / "digits.zarr.zip", root=tmp_path)
    images = StoredImages(tmp_path / "digits.zarr.zip", "train", 300)
    for seed in (0, 1):
        model = network("4:8", image_shape=images.image_shape, seed=seed)
        ((first,),) = batch_indices(len(images), 12, epochs=1, max_steps=1, shuffle=True, seed=seed)
        x_BCHW, y_B = images.batch(first)
        loss = torch.nn.functional.cross_entropy(model(x_BCHW), y_B).item()
        assert compared.loss.sel(seed=seed, strategy="kernel")[0].item() == pytest.approx(loss, rel=1e-5)


def test_the_bound_is_tight_enough_to_tell_a_learning_rate_that_is_one_percent_off(
    compared: xr.Dataset, given: tuple[str, ...], tmp_path: Path
) -> None:
    other = run(tmp_path, ("single",), "--learning-rate", "0.0101", *given)
    single, changed = (one.loss.sel(seed=0, strategy="single")[:EARLY] for one in (compared, other))
    assert (abs(changed - single) / single).max() > learning.rounding_bound(compared, EARLY)


def test_a_killed_comparison_loses_no_finished_training(given: tuple[str, ...], tmp_path: Path) -> None:
    kept, strategies = tmp_path / "kept", ("single", "kernel")
    options = ("--keep", str(kept), *given)
    # The first one has a cluster of its own, which goes with it.
    alone = [one for one in options if one != "--scheduler" and not one.startswith("tcp://")]
    first = [sys.executable, "-m", "pipeline", *command(tmp_path, strategies, *alone)]
    with subprocess.Popen(first, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        deadline = time.monotonic() + 120
        while not files(kept):
            assert time.monotonic() < deadline, "no training was finished"
            time.sleep(0.02)
        process.kill()
    before = files(kept)
    compared = run(tmp_path, strategies, *options)
    after = files(kept)
    assert {name: after[name] for name in before} == before, "a finished training was made again"
    assert set(after) == {f"seed-0/{name}" for name in (*strategies, CONTROL)}
    assert compared.loss.notnull().all()


def files(folder: Path) -> dict[str, int]:
    """The finished trainings, and the file that each is: one that is written anew is another."""
    found = folder.rglob("[!.]*.zarr.zip")
    return {str(path.relative_to(folder)).removesuffix(".zarr.zip"): path.stat().st_ino for path in found}
