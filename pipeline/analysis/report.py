"""The last steps of the study: Snakemake's report as one HTML file, and the executed notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, RunError

STYLESHEET = Path(__file__).parents[1] / "workflow" / "report" / "report.css"


def write_report(
    output: str | os.PathLike[str],
    *,
    snakefile: str | os.PathLike[str],
    configuration: Mapping[str, Any],
    targets: Sequence[str | os.PathLike[str]],
) -> Path:
    """Write Snakemake's self-contained report on `targets`, which exist, as `output`; opens without a network.

    Made to be called from a rule of the same workflow, in its working directory: a report takes no lock and only
    reads what finished jobs left, and its targets are that rule's inputs. Raises RunError with Snakemake's own
    words.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.stem}.") as folder:
        made, config = Path(folder, "report.html"), Path(folder, "config.json")
        config.write_text(json.dumps(configuration), encoding="utf-8")
        command = [sys.executable, "-m", "snakemake", *map(str, targets), "--snakefile", str(snakefile)]
        command += ["--configfile", str(config), "--cores", "1"]
        command += ["--report", str(made), "--report-stylesheet", str(STYLESHEET)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not made.exists():
            last = [line.strip() for line in done.stderr.splitlines() if line.strip()][-4:]
            raise RunError(f"Snakemake could not make the report {output}: {' '.join(last)}")
        made.replace(output)
    return output


def execute_notebook(
    template: str | os.PathLike[str],
    output: str | os.PathLike[str],
    stores: Mapping[str, str | os.PathLike[str]],
    *,
    timeout_s: float = 300,
) -> Path:
    """Execute the notebook `template` on the stores and write it, outputs included, as `output`.

    The notebook reads the path of each store from a variable of the first code cell, such as `timing = "timing.zarr"`;
    those that `stores` names are set anew, relative to the output's folder, where it runs. Raises InputError when the
    template has no such variable, RunError when a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from traitlets.config import Config

    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(template, as_version=4)  # type: ignore[no-untyped-call]
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = _with_paths(first.source, stores, output.parent, os.fspath(template))
    # The notebook imports the package that executes it, installed or not.
    search = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search)}
    with tempfile.TemporaryDirectory() as sockets:
        # Sockets in a folder of one's own instead of TCP ports that others could reach.
        config = Config(KernelManager={"transport": "ipc", "ip": str(Path(sockets, "kernel"))})
        resources = {"metadata": {"path": str(output.parent)}}
        client = NotebookClient(notebook, kernel_name="python3", timeout=timeout_s, resources=resources, config=config)
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            raise RunError(f"The notebook {template} failed: {error.ename}: {error.evalue}") from error
    aside = output.with_name(f".{output.name}.partial")
    nbformat.write(notebook, aside)  # type: ignore[no-untyped-call]
    aside.replace(output)
    return output


def _with_paths(source: str, stores: Mapping[str, str | os.PathLike[str]], folder: Path, template: str) -> str:
    lines = source.splitlines()
    for name, path in stores.items():
        place = next((i for i, line in enumerate(lines) if line.startswith(f"{name} = ")), None)
        if place is None:
            raise InputError(f"The first code cell of {template} sets no variable {name}: add a line '{name} = ...'.")
        lines[place] = f"{name} = {os.path.relpath(path, folder)!r}"
    return "\n".join(lines)
