"""The whole study in very small: end to end, killed and completed, and changed in one place.

The tests of this file share one folder, as runs of a study do; each leaves all cells measured.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import xarray as xr
import yaml

from pipeline.analysis.usage import usage
from pipeline.config import load_config
from pipeline.results.contracts import (
    NOT_PLANNED,
    OK,
    validate_accuracy,
    validate_calibration,
    validate_miscalibration,
    validate_timing,
)
from pipeline.results.stores import open_store

ROOT = Path(__file__).resolve().parents[2]
GPU_STUDY = ROOT / "pipeline" / "workflow" / "config" / "gpu.yaml"
STUDY: dict[str, Any] = {
    "data": "digits",
    "timing": {"warmup": 1, "rounds": 2, "repetitions": 3, "seconds": 0},
    "calibration": {"fractions": [0.5, 1.0], "repetitions": 1, "batch_size": 8},
    "experiments": {
        "baseline": {"networks": ["4:8"], "batch_sizes": [32], "device_sets": ["cpu"], "strategies": ["single"]},
        "split": {"networks": ["4:8"], "batch_sizes": [32], "device_sets": ["2 x cpu"], "strategies": ["kernel"]},
    },
    "accuracy": {
        "network": "4:8", "batch_size": 32, "device_set": "2 x cpu", "epochs": 1, "train_images": 96, "test_images": 64,
        "strategies": ["single", "kernel"], "seeds": [3, 4],
    },
    "miscalibration": {
        "network": "4:8", "batch_size": 32, "device_set": "2 x cpu", "errors": [0, 0.5], "strategies": ["kernel"],
    },
    "simulation": {"batch_sizes": [32], "device_sets": ["cpu", "100 x cpu"], "links": ["loopback", "1Gbit/s+1ms"]},
}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Study:
    """A folder with a configuration, and Snakemake in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configure(STUDY)

    def configure(self, content: object) -> None:
        (self.folder / "study.yaml").write_text(yaml.safe_dump(content))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "snakemake", "--cores", "2", "--snakefile", str(ROOT / "Snakefile")]
        return subprocess.Popen(
            [*command, *arguments, "--configfile", "study.yaml"],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> str:
        with self.start(*arguments) as process:
            said, _ = process.communicate()
        assert process.returncode == 0, said
        return said

    @property
    def cells(self) -> dict[Path, float]:
        """When each cell was written."""
        return {file: file.stat().st_mtime for file in (self.folder / "outputs" / "timing").rglob("*.zip")}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A finished study."""
    study = Study(tmp_path_factory.mktemp("study"))
    said = study.run()
    assert "Done: 0 of 1 calibrations, 0 of 2 cells, 0 of 6 trainings, 0 of 9 other jobs; about" in said, said
    assert "Done: 1 of 1 calibrations, 2 of 2 cells, 6 of 6 trainings," in said, said
    return study


def test_one_command_makes_stores_figures_report_and_notebook(study: Study) -> None:
    outputs = study.folder / "outputs"
    timing = open_store(outputs / "timing.zarr", validate_timing)
    assert timing.status.sel(device_set="cpu", strategy="single").item() == OK
    assert timing.status.sel(device_set="2 x cpu", strategy="kernel").item() == OK
    assert timing.status.sel(device_set="cpu", strategy="kernel").item() == NOT_PLANNED
    measured = timing.step_time.sel(network="4:8", batch_size=32, device_set="2 x cpu", link="loopback")
    assert (measured.sel(strategy="kernel") > 0).all()
    assert measured.attrs["units"] == "s"
    calibration = open_store(outputs / "calibration.zarr", validate_calibration)
    assert calibration.device_label.values.tolist() == [["cpu", "cpu"]], "one calibration serves both device sets"
    accuracy = open_store(outputs / "accuracy.zarr", validate_accuracy)
    assert accuracy.seed.values.tolist() == [3, 4]
    xr.testing.assert_allclose(
        accuracy.loss.sel(strategy="single", drop=True), accuracy.loss.sel(strategy="kernel", drop=True), rtol=1e-4
    )
    miscalibration = open_store(outputs / "miscalibration.zarr", validate_miscalibration)
    assert (miscalibration.status == OK).all()
    assert miscalibration.step_time.sel(error=[0, 0.5]).notnull().all()
    simulation = open_store(outputs / "simulation.zarr", validate_timing)
    assert simulation.attrs["simulated"]
    assert simulation.step_time.sel(device_set="100 x cpu").notnull().all()
    for store in (timing, accuracy, calibration, miscalibration, simulation):
        assert {"configuration", "versions", "hardware", "threads", "emulated", "data", "code_version"} <= set(
            store.attrs
        )
    assert timing.attrs["data"] == "digits (scikit-learn)"
    noted = usage(outputs, load_config(outputs / "configuration.yaml"))
    assert noted["stage"].tolist() == ["calibration"] * 1 + ["timing"] * 2 + [
        "miscalibration",
        "simulation",
        "accuracy",
    ]
    assert (noted["wall_s"] > 1).all()
    # A driver and workers that have imported torch hold more than that, and all of it is far from a real study's.
    assert noted["peak_memory_gib"].between(0.2, 8).all()
    page = (outputs / "report.html").read_text()
    assert "<html" in page
    assert f"took {noted['wall_s'].sum():.0f} s of wall time" in page
    assert (outputs / "analysis.ipynb").exists()
    assert {file.suffix for file in (outputs / "figures").iterdir()} >= {".svg", ".png"}


def test_a_second_run_has_nothing_to_do(study: Study) -> None:
    before = study.cells
    said = study.run()
    assert "Nothing to be done" in said, said
    assert study.cells == before


def test_a_changed_cell_alone_is_measured_anew_even_if_that_run_is_stopped(study: Study) -> None:
    """By a kill, the outdated cell still being there, and then once more by Ctrl-C."""
    before = study.cells
    (cell,) = (file for file in before if file.name == "kernel.zarr.zip")
    study.configure(with_repetitions(4))
    for stop in (signal.SIGKILL, signal.SIGINT):
        with study.start("timing") as process:
            job = wait_for_job(process, "benchmark")
            family = [job, *job.children(recursive=True)]
            # A terminal's Ctrl-C reaches the jobs too; a kill reaches Snakemake alone, and its jobs must notice.
            (os.killpg if stop == signal.SIGINT else os.kill)(process.pid, stop)
            process.communicate()
        assert process.returncode != 0
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive, f"processes of the run stopped by {stop.name} go on"
        assert not cell.exists()
    said = study.run("timing")
    assert "Done: 0 of 1 cells, 0 of" in said, "what is done already was counted"
    assert {file for file, written in study.cells.items() if before[file] != written} == {cell}
    timing = open_store(study.folder / "outputs" / "timing.zarr", validate_timing)
    assert timing.step_time.sel(strategy="kernel").count() == 4


def test_an_unknown_key_ends_with_one_sentence_and_exit_code_2(study: Study) -> None:
    study.configure(STUDY | {"trainin": {}})
    with study.start() as process:
        said, _ = process.communicate()
    assert process.returncode == 2
    assert said.splitlines()[-1] == "Error: Unknown key trainin in the configuration: did you mean training?"


def dry_run(folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit code of a dry run in an empty folder, and all that it said."""
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "2", "--snakefile", str(ROOT / "Snakefile")]
    done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_study_of_gpus_leaves_out_what_needs_more_of_them(tmp_path: Path) -> None:
    code, said = dry_run(tmp_path, "--configfile", str(GPU_STUDY), "--config", "gpus=2")
    assert code == 0, said
    assert "Left out, as there are 2 GPUs: gpu + gpu1 + gpu2, gpu + gpu1 + gpu2 + gpu3." in said
    assert "timing/500-1500/batch-1024/gpu+gpu1/loopback" in said
    assert "gpu2/" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_study_of_gpus_is_refused_in_a_sentence_without_one(tmp_path: Path) -> None:
    code, said = dry_run(tmp_path, "--configfile", str(GPU_STUDY))
    assert code == 2
    assert "but there is no GPU here: run the study where one is visible" in said.splitlines()[-1]


def with_repetitions(number: int) -> dict[str, Any]:
    """The study, but for the number of timed steps of its split cell."""
    experiments = STUDY["experiments"]
    return STUDY | {"experiments": experiments | {"split": experiments["split"] | {"repetitions": number}}}


def wait_for_job(snakemake: subprocess.Popen[str], command: str) -> psutil.Process:
    """The process of the job that runs the command, once it has started worker processes."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(snakemake.pid).children(recursive=True):
            # Snakemake's short-lived helpers may end between being listed and being asked.
            with contextlib.suppress(psutil.NoSuchProcess):
                if command in child.cmdline() and len(child.children(recursive=True)) >= 2:
                    return child
        time.sleep(0.1)
    raise AssertionError(f"no job ran {command}")
