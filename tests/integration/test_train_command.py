"""`train` as a user runs it: a network and images of one's own, and a checkpoint that plain torch goes on with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from PIL import Image
from safetensors.torch import load_file

import pipeline
from pipeline import progress
from pipeline.cli import main
from pipeline.cluster.devices import discover
from pipeline.networks import network
from pipeline.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
MODULE = '''
import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


def tiny(num_classes):
    """A residual network of two convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes)
    )
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project of a user: a module, and images of three colours."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "mynets.py").write_text(MODULE)
    random = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (project / "images" / name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 100, (12, 12, 3), dtype=np.uint8)
            pixels[:, :, channel] += 100
            Image.fromarray(pixels).save(project / "images" / name / f"{number}.png")
    return project


def run(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", name, "--network", "mynets:tiny", "--data", "images", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_factory_in_the_current_folder_trains_and_its_checkpoint_is_that_of_plain_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--batch-size", "16", "--epochs", "4", "--accumulate", "2", "--clip-norm", "5", "--schedule", "cosine"]
    split = ["--devices", "2 x cpu", "--strategy", "kernel", "--shares", "0.6,0.4", "--checkpoint", "split.safetensors"]
    done = run(folder, "train", *common, "--learning-rate", "0.05", "--weight-decay", "0.001", *split)
    assert done.returncode == 0, done.stderr
    accuracies = re.findall(
        r"^Epoch (\d) of 4: loss [\d.]+, test accuracy ([\d.]+) %, [\d.]+ images/s \(", done.stdout, re.MULTILINE
    )
    assert [number for number, _ in accuracies] == ["1", "2", "3", "4"]
    assert "kernel over cpu, cpu, batch 16" in done.stdout
    assert "100 % of the convolution FLOPs are split." in done.stdout
    assert "Weights written to split.safetensors." in done.stdout

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    single = ["--devices", "cpu", "--strategy", "single", "--checkpoint", "single.pt"]
    single += ["--network", "mynets:tiny", "--data", "images", "--learning-rate", "0.05", "--weight-decay", "0.001"]
    assert main(["train", *common, *single]) == 0
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "mynets.py", "single.pt", "split.safetensors",
    ]  # fmt: skip

    from mynets import tiny  # type: ignore[import-not-found]

    model = tiny(num_classes=3)
    weights = load_file(folder / "split.safetensors")
    model.load_state_dict(weights)
    whole = torch.load(folder / "single.pt", weights_only=True)
    for name, tensor in whole.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


def test_epochs_are_told_while_the_training_goes_on(folder: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "train", "--network", "mynets:tiny", "--data", "images"]
    command += ["--devices", "cpu", "--strategy", "single", "--epochs", "100000", "--checkpoint", "weights.pt"]
    command += ["--batch-size", "16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told: list[str] = []
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        # Lines that come only at the end do not come within the time that a test has.
        for line in process.stdout:
            told += [line] if line.startswith("Epoch ") else []
            if len(told) == 3:
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert len(told) == 3, errors
    assert all(re.match(r"Epoch \d of 100000: loss [\d.]+, test accuracy [\d.]+ %, ", line) for line in told)
    assert [line.split()[1] for line in told] == ["1", "2", "3"]
    assert all(re.search(r" images/s \([\d.e-]+ s, [^,]+ left\)$", line) for line in told)
    assert (process.returncode, errors.splitlines()[-1]) == (130, "Interrupted.")
    assert not (folder / "weights.pt").exists()


def test_workers_that_cannot_import_the_module_are_told_before_anything_runs(
    folder: Path, foreign_cluster: Callable[..., Path]
) -> None:
    scheduler = foreign_cluster(["--resources", "CPU=1", "--name", "elsewhere"])
    done = run(folder, "train", "--scheduler", str(scheduler), "--checkpoint", "weights.pt")
    assert done.returncode == 2
    assert "Network 'mynets:tiny' cannot be used on worker elsewhere" in done.stderr
    assert "start the workers where the module mynets can be imported" in done.stderr
    assert not (folder / "weights.pt").exists()
    done = run(folder, "benchmark", "--scheduler", str(scheduler))
    assert (done.returncode, "cannot be used on worker elsewhere" in done.stderr) == (2, True)


def test_what_a_training_calibrates_is_kept_for_the_next_one(
    folder: Path, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIPELINE_CACHE", str(folder.parent / "calibrations"))
    command = ["train", "--network", "4:8", "--data", str(folder / "images"), "--image-size", "32"]
    command += ["--devices", "2 x cpu", "--scheduler", client.scheduler.address, "--strategy", "kernel"]
    command += ["--batch-size", "16", "--max-steps", "1"]
    for taken in (False, True):
        assert main(command) == 0
        assert ("taken from the cache" in capsys.readouterr().out) == taken
        assert len(list((folder.parent / "calibrations").iterdir())) == 1


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_what_was_trained_is_used_as_it_was_validated(
    name: str, folder: Path, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    common = ["--data", "images", "--image-size", "16", "--devices", "cpu", "--strategy", "single", "--epochs", "2"]
    common += ["--network", "4:6", "--batch-size", "16", "--scheduler", client.scheduler.address]
    assert main(["train", *common, "--checkpoint", name]) == 0
    accuracies = re.findall(r"^Epoch \d of 2: .*, test accuracy ([\d.]+) %", capsys.readouterr().out, re.MULTILINE)
    assert len(accuracies) == 2
    assert main(["evaluate", "--data", "images", "--weights", name, "--device", "cpu"]) == 0
    assert f"12 images, accuracy {accuracies[-1]} %" in capsys.readouterr().out
    assert main(["predict", "images/red", "--weights", name, "--device", "cpu", "--output", "told.csv"]) == 0
    rows = (folder / "told.csv").read_text().splitlines()
    assert len(rows) == 21
    assert rows[0] == "image,class,probability"
    assert {row.split(",")[1] for row in rows[1:]} <= {"red", "green", "blue"}


class Titles(Progress):
    """Notes what is begun, and what is shown of it."""

    def __init__(self) -> None:
        super().__init__("nothing yet", shown=False)
        self.begun: list[str] = []
        self.told: list[tuple[str | None, int, int | None]] = []

    def begin(self, title: str, total: int | None = None) -> None:
        super().begin(title, total)
        self.begun.append(title)

    def show(self, done: int, total: int | None, note: str, title: str | None = None) -> None:
        super().show(done, total, note, title)
        self.told.append((title, done, total))


def test_fit_tells_what_it_does_where_that_is_wanted(
    client: Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0.0)
    monkeypatch.setattr(progress, "_LOOK_S", 0.001)
    images = torch.utils.data.TensorDataset(torch.randn(24, 3, 16, 16), torch.randint(0, 3, (24,)))
    given: dict[str, Any] = {
        "model": network("2:3", classes=3, image_shape=(3, 16, 16)), "dataset": images, "client": client,
        "members": discover(client)[:2], "batch_size": 8, "strategy": "kernel", "epochs": 2, "label": "net",
    }  # fmt: skip
    titles = Titles()
    calibration = pipeline.fit(**given, progress=titles).calibration
    assert titles.begun == ["capture net", "prepare net", "calibrate net", "plan net", "train net"]
    assert titles.told[-1] == ("train net, epoch 2 of 2", 3, 3)
    assert any(total is not None and title is None for title, _, total in titles.told), "the calibration reports"
    pipeline.fit(**given, calibration=calibration, progress=True)
    assert "train net, epoch 2 of 2: 3 of 3, loss " in capsys.readouterr().err
    pipeline.fit(**given, calibration=calibration, progress=False)
    assert capsys.readouterr().err == ""
