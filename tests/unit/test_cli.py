"""The command line: help everywhere, and one sentence with exit code 2 for what cannot work."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from PIL import Image
from typer.main import get_command

from pipeline.cli import app, main
from pipeline.cli.results import figures
from pipeline.cli.simulate import _emulated_sets, _usual_sets
from pipeline.datasets import prepare
from pipeline.errors import InputError
from pipeline.progress import Progress
from pipeline.results.stores import write_store, write_zip
from pipeline.version import package_version

COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands if command.callback)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.zarr.zip"
    prepare("digits", path, root=path.parent, progress=False)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What standard error says of a command that ends with exit code 2: a single line."""
    assert main([str(argument) for argument in arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Dashboard")]
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize("command", ["train", "calibrate", "benchmark", "miscalibration", "accuracy"])
def test_an_unknown_network_is_refused_before_images_are_read(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    further = {
        "calibrate": ["--output", tmp_path / "calibration.zarr.zip"],
        "miscalibration": ["--output", tmp_path / "miscalibration.zarr"],
        "accuracy": ["--strategy", "kernel", "--output", tmp_path / "accuracy.zarr"],
    }
    said = refused(capsys, command, "--network", "resnet81", "--data", "/no/images", *further.get(command, []))
    assert "'resnet81' is unknown" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"python -m pipeline {command}" in shown
    assert "\n\n  " in shown, "a sentence on what the command does"
    assert f"Example:\n    python -m pipeline {command} " in shown


def example_of(command: str) -> list[str]:
    made = get_command(app).commands[command].epilog
    return shlex.split(made.splitlines()[-1])[3:]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_has_options_that_it_takes(command: str) -> None:
    name, *arguments = example_of(command)
    assert name == command
    with get_command(app).commands[command].make_context(command, arguments):
        pass


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pipeline {package_version()}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", package_version())


def test_the_commands_are_those_that_the_study_needs() -> None:
    assert set(COMMANDS) >= {"devices", "data", "calibrate", "train", "benchmark", "report"}


def test_help_needs_neither_torch_nor_dask() -> None:
    program = (
        "import sys; from pipeline.cli import main; code = main(['benchmark', '--help']);"
        "sys.exit(code or bool({'torch', 'distributed', 'xarray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--network", "resnet81"], "'resnet18'"),
        (["--network", "0:5"], "both widths must be at least 1"),
        (["--network", "8:16", "--devices", "2 x cup"], "'2 x cup' in the device set"),
        (["--network", "8:16", "--devices", "0 x cpu"], "the count must be at least 1"),
        (["--network", "8:16", "--devices", "gpu7"], "GPU 7 was asked for"),
        (["--network", "8:16", "--strategy", "sinle"], "strategy 'sinle' is unknown"),
        (["--network", "nowhere.nets:tiny"], "there is no module nowhere"),
        (["--network", "8:16", "--optimizer", "lbfgs"], "the optimizers are sgd, adam, adamw, rmsprop, adagrad"),
        (["--network", "8:16", "--optimizer", "adam", "--momentum", "0.9"], "adam takes no --momentum"),
        (["--network", "8:16", "--schedule", "line"], "the schedules are none, step, cosine"),
        (["--network", "8:16", "--step-size", "2"], "--step-size belongs to --schedule step"),
        (["--network", "8:16", "--clip-norm", "0"], "clip_norm 0.0 must be above 0"),
        (["--network", "8:16", "--shares", "half,half"], "'half,half' are not numbers"),
        (
            ["--network", "8:16", "--calibration", "kept.zarr.zip", "--shares", "0.5,0.5"],
            "--calibration is for a plan that is made now: leave it out beside --plan or --shares",
        ),
        (["--network", "8:16", "--checkpoint", "/nowhere/at/all.pt"], "its folder does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(
    arguments: list[str], says: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, "train", "--data", images, *arguments)


@pytest.mark.parametrize("command", ["train", "calibrate", "benchmark"])
def test_wrong_devices_are_told_before_data_are_looked_for(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--output", tmp_path / "some.zarr.zip"] if command == "calibrate" else []
    given = ["--network", "8:16", "--data", tmp_path / "nowhere", "--devices", "2 x cpu@0", *there]
    assert "device speed must lie in (0, 1], not 0.0" in refused(capsys, command, *given)


@pytest.mark.parametrize("option", ["--batch-size", "--epochs", "--max-steps", "--accumulate", "--step-size"])
def test_numbers_below_1_are_refused(option: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--network", "8:16", "--data", str(images), option, "0"]) == 2
    assert f"Invalid value for '{option}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch-size", "100000"], "which has 1438 images"),
        (["--shares", "0.5,0.6"], "0.5 + 0.6 = 1.1 must add up to 1"),
    ],
    ids=["a batch larger than the data", "shares that do not add up"],
)
def test_what_does_not_fit_the_data_or_the_devices_is_refused(
    arguments: list[str], says: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--network", "2:3", "--data", images, "--devices", "2 x cpu", "--strategy", "kernel"]
    assert says in refused(capsys, "train", *common, *arguments)


def test_a_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(capsys, "data", tmp_path / "nowhere", "--output", tmp_path / "x.zarr.zip")


def test_images_of_different_sizes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for animal, size in [("cat", 8), ("dog", 9)]:
        (tmp_path / "images" / animal).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (size, size)).save(tmp_path / "images" / animal / f"{size}-{number}.png")
    assert "dog/9-" in refused(capsys, "data", tmp_path / "images", "--output", tmp_path / "x.zarr.zip")


def test_an_unreachable_scheduler_is_given_up_within_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert "tcp://127.0.0.1:9" in refused(capsys, "devices", "--scheduler", "tcp://127.0.0.1:9")
    assert time.monotonic() - start < 12


def test_a_file_that_is_no_scheduler_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scheduler.json").write_text("{}")
    assert "scheduler.json" in refused(capsys, "devices", "--scheduler", tmp_path / "scheduler.json")


class TestStores:
    def test_a_store_that_is_no_timing_grid_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_store(xr.Dataset({"a": ("b", np.zeros(2))}), tmp_path / "timing.zarr")
        assert "timing.zarr is not a timing grid" in refused(capsys, "figures", tmp_path)

    def test_a_study_without_stores_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "timing.zarr does not exist" in refused(capsys, "figures", tmp_path)

    def test_a_report_needs_a_finished_study(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "configuration.yaml").write_text("data: digits\n")
        assert "headline.html does not exist" in refused(capsys, "report", tmp_path)

    def test_a_file_that_is_no_cell_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_zip(xr.Dataset({"a": 1}), tmp_path / "cell.zarr.zip")
        said = refused(capsys, "combine", tmp_path / "cell.zarr.zip", "--output", tmp_path / "timing.zarr")
        assert "cell.zarr.zip is not a calibration" in said


def test_progress_is_lines_where_standard_error_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with Progress("train 8:16", 3) as progress:
        for step in range(1, 4):
            progress(step, {"loss": 2.5})
    assert capsys.readouterr().err == "train 8:16: 2 of 3, loss 2.5\n"


def test_the_usual_sets_to_simulate_hold_the_emulated_devices_of_which_several_were_calibrated() -> None:
    def calibrated(*labels: str) -> xr.Dataset:
        return xr.Dataset({"device_label": ("device", np.array(labels, object))})

    files = {"50:500": [calibrated("cpu", "cpu@0.5"), calibrated(*["cpu@0.45"] * 3)], "8:16": [calibrated("cpu@0.45")]}
    sets = _emulated_sets(files)
    assert sets[:4] == ["cpu@0.45", "2 x cpu@0.45", "3 x cpu@0.45", "4 x cpu@0.45"]
    assert sets[-1] == "1024 x cpu@0.45"
    assert not any("cpu@0.5" in one for one in sets)


def test_figures_of_a_folder_without_measurements_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"timing\.zarr does not exist: measure the study first"):
        figures(tmp_path)


class TestUsualSets:
    CALIBRATED = (("cpu", "cpu@0.5"), ("gpu", "gpu1", "cpu"))

    def sets(self, labels: tuple[str, ...], described: dict[str, float]) -> list[str]:
        calibration = xr.Dataset({"device_label": ("device", np.array(labels, object))})
        return _usual_sets({"50:500": [calibration]}, described)

    def test_only_the_first_described_device_is_simulated_in_numbers(self) -> None:
        found = self.sets(self.CALIBRATED[0], {"gpu": 5e3, "gpu-1T": 1e3})
        assert {"cpu", "3 x cpu", "1024 x cpu", "gpu", "3 x gpu", "1024 x gpu", "gpu-1T"} <= set(found)
        assert {"gpu + 1 x cpu", "gpu + 4 x cpu", "gpu-1T + 1 x cpu", "gpu-1T + 4 x cpu"} <= set(found)
        assert not {"2 x gpu-1T", "2 x cpu@0.5"} & set(found)

    def test_another_gpu_of_the_machine_is_no_other_kind_and_no_gpu_stands_beside_a_gpu_as_a_cpu(self) -> None:
        found = self.sets(self.CALIBRATED[1], {"gpu-1T": 1e3})
        assert {"2 x gpu", "2 x cpu", "gpu-1T + 1 x cpu"} <= set(found)
        assert not [one for one in found if "gpu1" in one or (one.endswith("x gpu") and "+" in one)]
