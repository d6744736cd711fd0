"""The README is true: its program runs, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from pipeline.cli import app
from pipeline.results.contracts import validate_timing
from pipeline.results.stores import open_zip

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_program_in_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    script = tmp_path / "train.py"
    script.write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "kernel over cpu, cpu@0.5" in done.stdout
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert weights["0.weight"].shape == (50, 3, 5, 5)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)`|^make (\w+)", TEXT, re.MULTILINE))), ids=str)
def test_every_make_command_exists(target: tuple[str, str]) -> None:
    name = next(filter(None, target))
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


COMMANDS = re.findall(r"python -m pipeline (\w+) ((?:[^`\n\\]|\\\n)*)", TEXT)


@pytest.mark.parametrize(("command", "arguments"), COMMANDS, ids=[" ".join(one).split("\n")[0] for one in COMMANDS])
def test_every_option_of_a_command_exists(command: str, arguments: str) -> None:
    known = {option for one in get_command(app).commands[command].params for option in one.opts}
    assert set(re.findall(r"--[\w-]+", arguments)) <= known


FILES = sorted(set(re.findall(r"`(pipeline/[\w./-]+\.\w+)`", TEXT) + re.findall(r"\]\(((?!http)[\w./-]+)\)", TEXT)))


@pytest.mark.parametrize("path", FILES)
def test_every_file_that_is_named_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "outputs" / "reference").glob("*/timing*.zarr.zip")), ids=lambda path: path.name
)
def test_the_reference_results_are_timing_grids_that_say_where_they_come_from(path: Path) -> None:
    grid = open_zip(path, validate_timing)
    assert (grid.status == "ok").any()
    assert grid.attrs["hardware"]
    assert grid.attrs["emulated"]
