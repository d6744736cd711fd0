"""The report is one file that a rule of the workflow itself writes; the notebook runs on any grid."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest

from pipeline.analysis.figures import FIGURES, write_figures
from pipeline.analysis.report import execute_notebook, write_report
from pipeline.analysis.tables import write_headline
from pipeline.errors import InputError, RunError
from pipeline.results.stores import write_store
from tests import synthetic

PACKAGE = Path(__file__).parents[2] / "pipeline"
TEMPLATE = PACKAGE / "workflow" / "notebooks" / "analysis.ipynb"
# Stands for the study's Snakefile: what matters is that a rule makes the report of its own workflow while it runs.
SNAKEFILE = f"""
CAPTIONS = "{PACKAGE}/workflow/report/"
NAMES = {list(FIGURES)}
report: CAPTIONS + "study.rst"
rule all:
    input: "results/report.html"
rule figures:
    input: "made"
    output:
        [report(f"results/figures/{{n}}.svg", caption=CAPTIONS + f"{{n}}.rst", category="Figures") for n in NAMES],
        report("results/figures/headline.html", caption=CAPTIONS + "headline.rst", category="Headline"),
        expand("results/figures/{{n}}.rst", n=["headline", *NAMES]),
    shell: "cp {{input}}/* results/figures/"
rule report:
    input: rules.figures.output
    output: "results/report.html"
    run:
        from pipeline.analysis.report import write_report
        write_report(output[0], snakefile=workflow.main_snakefile, configuration=config, targets=input)
"""


@pytest.fixture(scope="module")
def grid():
    return synthetic.timing(synthetic.indices(("50:500",), (32,), ("cpu", "2 x cpu", "cpu + cpu@0.5")))


def test_a_rule_of_the_running_workflow_writes_the_report_with_every_figure_and_sentence(grid, tmp_path: Path):
    simulation = synthetic.simulation(batch_sizes=(32,))
    stores = {"timing": grid, "accuracy": synthetic.accuracy(), "calibration": synthetic.calibration()}
    write_figures(*stores.values(), tmp_path / "made", simulation=simulation)
    write_headline(grid, tmp_path / "made")
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--config", "outputs=results"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "results" / "report.html").read_text()
    assert "system-message" not in page
    assert 'src="http' not in page
    assert "Emulated devices" in page
    for name, entry in FIGURES.items():
        datasets = [(stores | {"simulation": simulation})[store] for store in entry.stores]
        words = entry.say(*datasets).splitlines()[0].removeprefix("- ").split("``")[0]
        assert page.count(words) >= 2, f"{name} is neither on the first page nor beside its figure"
    assert page.count("<svg") >= len(FIGURES)
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "Nothing to be done" in again.stderr + again.stdout


def test_a_report_that_cannot_be_made_says_why_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "Snakefile").write_text('rule all:\n    output: "x"\n    shell: "touch x"\n')
    with pytest.raises(RunError, match="could not make the report"):
        write_report(
            tmp_path / "out" / "report.html", snakefile=tmp_path / "Snakefile", configuration={}, targets=["missing"]
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_the_notebook_runs_on_a_small_grid_and_keeps_its_outputs(grid, tmp_path: Path):
    datasets = {"timing": grid, "accuracy": synthetic.accuracy(), "calibration": synthetic.calibration()}
    stores = {name: write_store(dataset, tmp_path / f"{name}.zarr") for name, dataset in datasets.items()}
    path = execute_notebook(TEMPLATE, tmp_path / "out" / "analysis.ipynb", stores)
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "timing = '../timing.zarr'" in code[0].source
    assert all(cell.outputs for cell in code[1:])
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)
    assert sum("image/svg+xml" in out.get("data", {}) for cell in code for out in cell.outputs) == 4


def test_the_template_carries_no_outputs():
    assert not any(cell.get("outputs") for cell in nbformat.read(TEMPLATE, as_version=4).cells)


def test_a_notebook_that_does_not_name_a_store_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="sets no variable simulation"):
        execute_notebook(TEMPLATE, tmp_path / "analysis.ipynb", {"simulation": tmp_path})


def test_a_notebook_that_fails_is_named_and_leaves_no_output(tmp_path: Path):
    before = psutil.Process().children()
    with pytest.raises(RunError, match=r"analysis\.ipynb failed: FileNotFoundError"):
        execute_notebook(TEMPLATE, tmp_path / "out.ipynb", {"timing": tmp_path / "missing.zarr"})
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().children() == before
