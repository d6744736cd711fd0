"""What the Snakefile builds on: which code a command executes, and what a killed run leaves to the next one."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.workflow import code, session


def names_of(module: str) -> set[str]:
    return {path.relative_to(code.PACKAGE).as_posix() for path in code.code_of(module)}


class TestCode:
    def test_it_follows_imports_and_those_within_functions(self) -> None:
        assert {"cli/benchmark.py", "run/benchmark.py", "run/execution.py", "plan/costs.py"} <= names_of(
            "pipeline.cli.benchmark"
        )

    @pytest.mark.parametrize("command", ["data", "calibrate", "benchmark", "accuracy", "miscalibration"])
    def test_a_measurement_does_not_depend_on_figures_or_help_texts(self, command: str) -> None:
        found = names_of(f"pipeline.cli.{command}")
        assert not [name for name in found if name.startswith("analysis/")]
        assert not found & {"cli/options.py", "progress.py", "cli/__init__.py", "config.py"}

    def test_images_do_not_depend_on_the_engine(self) -> None:
        assert not [name for name in names_of("pipeline.cli.data") if name.startswith(("run/", "plan/", "cluster/"))]

    @pytest.mark.parametrize(
        ("changed", "same"),
        [
            ('"""Other words."""\nx = 1  # a comment\n', True),
            ('"""Words."""\n\nx = (\n    1\n)\n', True),
            ('"""Words."""\nx = 2\n', False),
        ],
        ids=["other words", "other layout", "another value"],
    )
    def test_the_digest_changes_with_what_the_code_does(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, same: bool
    ) -> None:
        digests = []
        for version, text in enumerate(['"""Words."""\nx = 1\n', changed]):
            package = tmp_path / str(version) / "package"
            package.mkdir(parents=True)
            (package / "module.py").write_text(text)
            monkeypatch.setattr(code, "PACKAGE", package)
            code._file_of.cache_clear()
            digests.append(code.code_digest("package.module"))
        code._file_of.cache_clear()
        assert (digests[0] == digests[1]) is same


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a killed Snakemake left its locks, and two outputs of which it had finished one."""
    monkeypatch.chdir(tmp_path)
    state = tmp_path / ".snakemake"
    (state / "locks").mkdir(parents=True)
    (state / "locks" / "0.output.lock").write_text("half")
    (state / "incomplete").mkdir()
    (state / "incomplete" / base64.urlsafe_b64encode(b"half").decode()).write_text("{}")
    for name in ("half", "whole"):
        Path(name).write_text(name)
    return state


class TestKilledRun:
    def test_a_run_that_is_alone_clears_what_was_left(self, state: Path) -> None:
        assert session.clear_after_kill(state)
        assert not (state / "locks").exists()
        assert not Path("half").exists()
        assert Path("whole").exists()

    def test_long_names_that_snakemake_cuts_in_pieces_are_found(self, state: Path) -> None:
        name = "/".join(["a" * 60] * 5)
        encoded = base64.urlsafe_b64encode(name.encode()).decode()
        (state / "incomplete" / f"@{encoded[:254]}").mkdir()
        (state / "incomplete" / f"@{encoded[:254]}" / encoded[254:]).write_text("{}")
        Path(name).mkdir(parents=True)
        assert session.clear_after_kill(state)
        assert not Path(name).exists()

    def test_the_locks_of_a_run_that_is_alive_stay(self, state: Path) -> None:
        with python("session.clear_after_kill(); print(flush=True); sys.stdin.read()") as other:
            assert other.stdout is not None
            other.stdout.readline()
            (state / "locks").mkdir()
            assert not session.clear_after_kill(state)
            assert (state / "locks").exists()
            other.kill()


def test_a_job_ends_when_its_snakemake_is_killed() -> None:
    job = "import time; from pipeline.workflow import session; session.end_with_snakemake(); time.sleep(60)"
    start = f"job = subprocess.Popen([sys.executable, '-c', {job!r}], stderr=subprocess.DEVNULL)"
    with python(f"session.adopt_jobs(); {start}; print(job.pid, flush=True); job.wait()") as snakemake:
        assert snakemake.stdout is not None
        pid = int(snakemake.stdout.readline())
        snakemake.kill()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline, "the job goes on without its Snakemake"
        time.sleep(0.1)


def python(program: str) -> subprocess.Popen[str]:
    """Another process of this package that executes the program."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; from pipeline.workflow import session; {program}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(code.PACKAGE.parent)},
    )
