"""The command that plans from wrong calibrations and runs what comes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from pipeline.calibration.misjudged import misjudged
from pipeline.cli import main
from pipeline.datasets import prepare
from pipeline.graph.trace import trace
from pipeline.networks import network
from pipeline.plan.costs import Costs
from pipeline.plan.planner import plan_graph, predicted_step_time
from pipeline.results.contracts import OK, validate_calibration, validate_miscalibration
from pipeline.results.stores import open_store, open_zip
from pipeline.stored_images import StoredImages

NETWORK, DEVICES = "8:16", "cpu + cpu@0.5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a calibration, and a store of wrong ones."""
    folder = tmp_path_factory.mktemp("miscalibration")
    prepare("digits", folder / "digits.zarr.zip", root=folder, progress=False)
    common = ["--network", NETWORK, "--devices", DEVICES, "--data", str(folder / "digits.zarr.zip")]
    measured = ["--batch-size", "32", "--fraction", "0.25", "--fraction", "1", "--repetitions", "1", "--force"]
    assert main(["calibrate", *common, *measured, "--output", str(folder / "right.zarr.zip")]) == 0
    wrong = ["--batch-size", "32", "--error", "0.5", "--error", "-0.5", "--error", "0", "--strategy", "kernel"]
    wrong += [
        "--seconds",
        "0",
        "--rounds",
        "1",
        "--repetitions",
        "3",
        "--warmup",
        "1",
        "--calibration",
        str(folder / "right.zarr.zip"),
    ]
    assert main(["miscalibration", *common, *wrong, "--output", str(folder / "wrong.zarr")]) == 0
    return folder


def test_a_calibration_says_how_long_it_took(folder: Path) -> None:
    calibration = open_zip(folder / "right.zarr.zip", validate_calibration)
    assert 0 < calibration.calibration_time < 60
    assert calibration.calibration_time.attrs["units"] == "s"
    assert float(calibration.forward_time.sum()) < calibration.calibration_time, "it holds all that was measured"


def test_every_error_is_measured_and_predicted_under_the_right_calibration(folder: Path) -> None:
    store = open_store(folder / "wrong.zarr", validate_miscalibration)
    assert list(store.error.values) == [-0.5, 0, 0.5]
    assert (store.status == OK).all()
    assert (store.step_time > 0).all()
    assert store.sizes["repetition"] == 3
    assert store.attrs["misjudged_device"] == 1
    assert store.attrs["emulated"]
    calibration = open_zip(folder / "right.zarr.zip")
    with_images = StoredImages(folder / "digits.zarr.zip", "train", None)
    graph = trace(network(NETWORK, classes=10, image_shape=with_images.image_shape),
                  torch.zeros(2, *with_images.image_shape))  # fmt: skip
    for error in (-0.5, 0.5):
        plan = plan_graph(
            graph, misjudged(calibration, 1, error), batch_size=32, strategy="kernel", labels=["cpu", "cpu@0.5"]
        )
        expected = predicted_step_time(graph, plan, Costs.of(calibration))
        found = store.predicted_step_time.sel(error=error).item()
        np.testing.assert_allclose(found, expected)


def test_what_was_measured_has_the_units_of_a_timing_grid(folder: Path) -> None:
    with xr.open_zarr(folder / "wrong.zarr") as store:
        assert store.step_time.attrs["units"] == "s"
        assert store.error.attrs["long_name"].startswith("relative error")


def test_a_device_that_is_not_there_is_refused_in_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--network", NETWORK, "--devices", DEVICES, "--data", folder / "digits.zarr.zip", "--device", "2"]
    arguments += ["--calibration", folder / "right.zarr.zip", "--output", folder / "none.zarr"]
    assert main(["miscalibration", *map(str, arguments)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert said == ["Error: device 2 cannot be misjudged: the calibration is of devices 0 to 1."]
    assert not (folder / "none.zarr").exists()
