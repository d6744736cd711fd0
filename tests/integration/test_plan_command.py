"""`plan` as a user runs it, and a run that keeps to the plan it wrote."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from distributed import Client

import pipeline
from pipeline.cli import main
from pipeline.cluster.devices import discover
from pipeline.datasets import prepare
from pipeline.graph.trace import trace
from pipeline.networks import network
from pipeline.plan.checks import check_plan
from pipeline.plan.strategies import plan_network
from pipeline.results.stores import write_zip
from pipeline.run.launch import example_batch
from pipeline.stored_images import StoredImages
from tests import synthetic

ROOT = Path(__file__).resolve().parents[2]
LABELS = ("cpu", "cpu")
SLOWER = 3
"""The calibration takes the second device for so many times slower, so that equal shares are not those of the plan."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared images, and a calibration of 4:8 on two devices."""
    folder = tmp_path_factory.mktemp("plan")
    prepare("digits", folder / "images.zarr.zip", root=folder, progress=False)
    images = StoredImages(folder / "images.zarr.zip", "train")
    model = network("4:8", classes=len(images.classes), image_shape=images.image_shape)
    calibration = synthetic.calibration_of(trace(model, example_batch(images)), LABELS)
    for name in ("forward_time", "backward_time", "input_gradient_time"):
        calibration[name] = calibration[name] * xr.DataArray([1, SLOWER], dims="device")
    write_zip(calibration, folder / "calibration.zarr.zip")
    return folder


def run(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", name, "--network", "4:8", "--data", "images.zarr.zip", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def planned(folder: Path) -> subprocess.CompletedProcess[str]:
    """The command that wrote `plan.json`."""
    common = ["--calibration", "calibration.zarr.zip", "--strategy", "kernel", "--batch-size", "16"]
    return run(folder, "plan", *common, "--output", "plan.json")


def test_the_table_and_the_file_tell_the_same_plan(folder: Path, planned: subprocess.CompletedProcess[str]) -> None:
    assert planned.returncode == 0, planned.stderr
    written = json.loads((folder / "plan.json").read_text())
    assert (written["strategy"], written["batch_size"], written["labels"]) == ("kernel", 16, ["cpu", "cpu"])
    shares = next(one for one in written["operations"] if one["name"] == "conv2")["output"]["shares"]
    assert sum(shares) == 8
    assert shares[0] > shares[1] > 0
    said = planned.stdout
    assert "kernel over 2 x cpu, batch 16" in said
    row = next(line for line in said.splitlines() if "conv2" in line)
    assert row.split("R → K")[1].split()[:2] == [str(share) for share in shares]
    assert re.search(
        r"^Predicted step: [\d.]+ ms; the fastest device alone, device 0 \(cpu\), takes ", said, re.MULTILINE
    )
    assert re.search(r"^Speedup: [\d.]+x; all devices together would allow 1\.3\dx(, had .+)?\.$", said, re.MULTILINE)
    assert re.search(r"^What limits: .+\.$", said, re.MULTILINE)
    assert "Plan written to plan.json." in said


def test_the_command_trains_by_the_plan_and_refuses_another_batch_size(
    folder: Path, planned: subprocess.CompletedProcess[str], client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned.returncode == 0, planned.stderr
    command = ["train", "--network", "4:8", "--data", str(folder / "images.zarr.zip"), "--max-steps", "3"]
    command += ["--plan", str(folder / "plan.json"), "--scheduler", client.scheduler.address, "--devices", "2 x cpu"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert pipeline.read_plan(folder / "plan.json").table() in said
    assert "3 steps of " in said
    assert main([*command, "--batch-size", "32"]) == 2
    assert "the plan is for batch size 16, not 32" in capsys.readouterr().err


def test_each_device_holds_the_kernels_that_the_plan_gives_it(
    folder: Path, planned: subprocess.CompletedProcess[str], client: Client, tmp_path: Path
) -> None:
    assert planned.returncode == 0, planned.stderr
    plan = pipeline.read_plan(folder / "plan.json")

    def recording(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        """An optimiser that notes what its process has of the second convolution, whose kernels have 4 channels."""
        parameters = list(parameters)
        for one in parameters:
            if one.dim() == 4 and one.shape[1] == 4:
                (tmp_path / f"{os.getpid()}").write_text(str(one.shape[0]))
        return torch.optim.SGD(parameters, lr=0.01)

    images = StoredImages(folder / "images.zarr.zip", "train")
    model = network("4:8", classes=len(images.classes), image_shape=images.image_shape)
    fit = functools.partial(pipeline.fit, model, images, client, members=discover(client)[:2], plan=plan)
    result = fit(batch_size=16, max_steps=2, optimizer=recording)
    with pytest.raises(pipeline.InputError, match="the plan is for batch size 16, not 8"):
        fit(batch_size=8)
    assert result.plan == plan
    held = sorted(int(path.read_text()) for path in tmp_path.iterdir() if path.name != str(os.getpid()))
    assert held == sorted(plan["conv2"].output.shares)
    assert np.isfinite(result.history.loss).all()


def test_a_plan_that_leaves_all_kernels_to_the_first_device_can_be_trained_by() -> None:
    graph = trace(network("4:8"), torch.zeros(2, 3, 32, 32))
    check_plan(plan_network(graph, "kernel", batch_size=16, labels=LABELS, shares=(1.0, 0.0)), graph, LABELS)


def test_a_plan_is_written_and_read_in_python(folder: Path, planned: subprocess.CompletedProcess[str]) -> None:
    assert planned.returncode == 0, planned.stderr
    plan = pipeline.read_plan(str(folder / "plan.json"))
    pipeline.write_plan(plan, folder / "again.json")
    assert (folder / "again.json").read_text() == (folder / "plan.json").read_text()
    with pytest.raises(pipeline.InputError, match=r"the plan cannot be written to .*nowhere"):
        pipeline.write_plan(plan, folder / "nowhere" / "plan.json")
