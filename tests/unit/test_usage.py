"""What a job takes is noted with its child processes, and summed up for the study that is configured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.analysis.usage import NOT_NOTED, usage, usage_finding, write_usage
from pipeline.config import Config, load_config
from pipeline.workflow.usage import FILE_VARIABLE, noted_usage

_MIB = 2**20


def test_the_memory_of_children_counts_and_the_time_does_too(tmp_path: Path) -> None:
    child = "import time; held = bytearray(300 * 2**20); held[::4096] = b'x' * len(held[::4096]); time.sleep(1.5)"

    def noted(work: str) -> dict[str, float]:
        """What a process of its own notes: what this one holds, and forks, depends on the tests before."""
        code = (
            f"import subprocess, sys\nfrom pipeline.workflow.usage import noted_usage\nwith noted_usage():\n    {work}"
        )
        environment = os.environ | {FILE_VARIABLE: str(tmp_path / "logs" / "job.usage.json")}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        found: dict[str, float] = json.loads((tmp_path / "logs" / "job.usage.json").read_text())
        return found

    with_child, alone = noted(f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"), noted("pass")
    assert 300 * _MIB < with_child["peak_memory_bytes"] - alone["peak_memory_bytes"] < 400 * _MIB
    assert with_child["wall_s"] > 1.5


def test_a_job_that_fails_notes_its_usage_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "job.usage.json"))
    with pytest.raises(KeyboardInterrupt), noted_usage():
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "job.usage.json").read_text())["peak_memory_bytes"] > 0


def test_elsewhere_than_in_a_job_nothing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with noted_usage():
        pass
    assert not list(tmp_path.iterdir())


@pytest.fixture
def study(tmp_path: Path) -> Config:
    """Of two calibrations and one group of cells; a group that is no longer part of it has left a note as well."""
    one = {"networks": ["5:1"], "batch_sizes": [8], "device_sets": ["cpu"], "strategies": ["single"]}
    study = load_config({"experiments": {"x": one}})
    note(tmp_path, "calibration/5-1/cpu+cpu@0.5", 10, 1.0)
    note(tmp_path, "calibration/16-64/cpu+cpu@0.5", 20, 1.5)
    note(tmp_path, "timing/5-1/batch-8/cpu/loopback", 30, 9.0)
    note(tmp_path, "timing/5-1/batch-16/cpu/loopback", 999, 99.0)
    note(tmp_path, "accuracy", 40, 2.0)
    (tmp_path / "configuration.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json")))
    return study


def note(outputs: Path, job: str, wall_s: float, memory_gib: float) -> None:
    file = outputs / "logs" / f"{job}.usage.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"wall_s": wall_s, "peak_memory_bytes": memory_gib * 2**30}))


def test_the_jobs_of_the_study_are_summed_up_and_the_hungriest_is_named(study: Config, tmp_path: Path) -> None:
    said = usage_finding(usage(tmp_path, study))
    assert "The 4 measuring jobs of this study took 100 s of wall time" in said
    assert (
        "``5-1/batch-8/cpu/loopback`` of timing, held 9.00 GiB in all its processes, above the limit of 8 GiB" in said
    )
    (row,) = (part for part in said.split("   * - ") if part.startswith("calibration"))
    assert [line.strip(" -") for line in row.splitlines()] == ["calibration", "2", "30", "20", "1.50"]


def test_a_study_below_the_limit_is_within_it(study: Config, tmp_path: Path) -> None:
    note(tmp_path, "timing/5-1/batch-8/cpu/loopback", 30, 7.99)
    assert "within the limit" in usage_finding(usage(tmp_path, study))


def test_a_study_without_notes_says_so(tmp_path: Path) -> None:
    assert write_usage(tmp_path, tmp_path / "figures").read_text() == f"{NOT_NOTED}\n"
    assert usage_finding(usage(tmp_path, Config())) == f"{NOT_NOTED}\n"
