"""The report is one file that a rule of the workflow itself writes; the notebook runs on any grid."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest

from pipeline.analysis.figures import FIGURES, write_figures
from pipeline.analysis.prediction_tables import cells_table, write_predictions
from pipeline.analysis.report import execute_notebook, write_report
from pipeline.analysis.sections import SECTIONS, caption, heading, write_page
from pipeline.analysis.tables import write_headline
from pipeline.analysis.usage import NOT_NOTED, write_usage
from pipeline.analysis.wording import sentences_of
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
        expand("results/figures/{{n}}.rst", n=["headline", "study", "usage", *NAMES]),
    shell: "cp {{input}}/* results/figures/"
rule report:
    input: rules.figures.output
    output: "results/report.html"
    run:
        from pipeline.analysis.report import write_report
        write_report(output[0], snakefile=workflow.main_snakefile, configuration=config, targets=input)
"""


@pytest.fixture(scope="module")
def stores():
    return synthetic.study()


def test_a_rule_of_the_running_workflow_writes_the_report_with_every_question_figure_and_sentence(
    stores, tmp_path: Path
):
    write_figures(stores, tmp_path / "made")
    write_headline(stores["timing"], tmp_path / "made", simulation=stores["simulation"])
    write_predictions(stores["timing"], tmp_path / "made")
    write_page(tmp_path / "made")
    write_usage(tmp_path, tmp_path / "made")
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--config", "outputs=results"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "results" / "report.html").read_text()
    assert "system-message" not in page
    assert 'src="http' not in page
    assert "Emulated devices" in page
    assert "{{" not in page.split("Distributed training of CNNs", 1)[1].split("</body>", 1)[0]
    for section in SECTIONS:
        assert heading(section) in page
    assert NOT_NOTED in page
    assert f"All {len(cells_table(stores['timing']))} cells" in page
    assert "figures/predictions.csv" in page
    for name, entry in FIGURES.items():
        for sentence in sentences_of(entry.say(*(stores[store] for store in entry.stores))):
            words = max(sentence.split("``"), key=len)
            assert words in html.unescape(page), f"a sentence on {name} is missing: {sentence}"
        words = caption(name).splitlines()[0].split("``")[0].split("*")[-1]
        assert page.count(words) >= 2, f"the caption of {name} is not both on the first page and beside its figure"
    assert page.count("<svg") >= len(FIGURES)


def test_a_report_that_cannot_be_made_says_why_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "Snakefile").write_text('rule all:\n    output: "x"\n    shell: "touch x"\n')
    with pytest.raises(RunError, match="could not make the report"):
        write_report(
            tmp_path / "out" / "report.html", snakefile=tmp_path / "Snakefile", configuration={}, targets=["missing"]
        )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("devices", [None, ("cpu@0.45", "2 x cpu@0.45")], ids=["a study", "two devices at most"])
def test_the_notebook_answers_three_questions_with_numbers_and_keeps_its_outputs(stores, devices, tmp_path: Path):
    grids = {name: stores[name] for name in ("timing", "simulation")}
    if devices is not None:
        grids = {name: grid.sel(device_set=list(devices)) for name, grid in grids.items()}
    paths = {name: write_store(dataset, tmp_path / f"{name}.zarr") for name, dataset in grids.items()}
    path = execute_notebook(TEMPLATE, tmp_path / "out" / "analysis.ipynb", paths)
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "timing = '../timing.zarr'" in code[0].source
    assert all(cell.outputs for cell in code[1:])
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)
    for cell in code[3:]:
        said = "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")
        assert re.search(r"\d", said), "a question has no printed sentence with a number"
        assert {"text/html", "image/svg+xml"} & {kind for out in cell.outputs for kind in out.get("data", {})}
    assert len(code[3:]) == 3


def test_the_template_carries_no_outputs():
    assert not any(cell.get("outputs") for cell in nbformat.read(TEMPLATE, as_version=4).cells)


def test_a_notebook_that_does_not_name_a_store_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="sets no variable accuracy"):
        execute_notebook(TEMPLATE, tmp_path / "analysis.ipynb", {"accuracy": tmp_path})


def test_a_notebook_that_fails_is_named_and_leaves_no_output(tmp_path: Path):
    before = psutil.Process().children()
    with pytest.raises(RunError, match=r"analysis\.ipynb failed: FileNotFoundError"):
        execute_notebook(TEMPLATE, tmp_path / "out.ipynb", {"timing": tmp_path / "missing.zarr"})
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().children() == before
