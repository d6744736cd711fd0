"""From one file per job to stores, figures, report and notebook: `combine`, `figures`, `report`, `notebook`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

OutputsArgument = Annotated[Path, typer.Argument(help="Folder of the study, with its stores.")]


def combine(
    files: Annotated[
        list[Path], typer.Argument(help="Folders that `benchmark` wrote, or files that it or `calibrate` wrote.")
    ],
    output: Annotated[Path, typer.Option("--output", help="Store to write, such as timing.zarr.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="The study's configuration: its cells must all be there, no others.")
    ] = None,
) -> None:
    """Combine the cells of a timing grid, or several calibrations, into one store."""
    from pipeline.config import cells, load_config
    from pipeline.results import stores
    from pipeline.results.contracts import cell_index, validate_calibration, validate_timing

    study = load_config(config) if config is not None else None
    files = [file for one in files for file in (sorted(one.glob("*.zarr.zip")) if one.is_dir() else [one])]
    parts = [stores.open_zip(file) for file in files]
    are_cells = {"strategy" in part.coords for part in parts}
    if len(are_cells) > 1:
        raise InputError("the files are partly cells and partly calibrations: combine one kind at a time")
    if are_cells == {True}:
        found = [cell_index(part, str(file)) for part, file in zip(parts, files, strict=True)]
        combined = stores.combine(parts, found if study is None else [astuple(cell) for cell in cells(study)])
        validate_timing(combined, str(output))
    else:
        for part, file in zip(parts, files, strict=True):
            validate_calibration(part, str(file))
        combined = stores.combine_calibrations(parts)
    if study is not None:
        combined.attrs["configuration"] = json.dumps(study.model_dump(mode="json"), sort_keys=True)
    stores.write_store(combined, output)
    sizes = ", ".join(f"{size} {name}" for name, size in combined.sizes.items())
    print(f"{len(parts)} files combined into {output}: {sizes}.")


def figures(
    outputs: OutputsArgument = Path("outputs"),
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write, OUTPUTS/figures if not given.")
    ] = None,
) -> None:
    """Draw all figures of a study, the headline table and the page of the report; a missing store is said to be so."""
    from pipeline.analysis.figures import write_figures
    from pipeline.analysis.prediction_tables import write_predictions
    from pipeline.analysis.sections import write_page
    from pipeline.analysis.tables import write_headline
    from pipeline.analysis.usage import write_usage
    from pipeline.results.stores import open_store

    found = {name: open_store(outputs / f"{name}.zarr", check) for name, check in _checks(outputs).items()}
    if "timing" not in found:
        raise InputError(
            f"{outputs / 'timing.zarr'} does not exist: measure the study first with snakemake --cores all"
        )
    folder = output or outputs / "figures"
    written = write_figures(found, folder)
    written += write_headline(found["timing"], folder, simulation=found.get("simulation"))
    written += write_predictions(found["timing"], folder)
    written += [write_page(folder), write_usage(outputs, folder)]
    print(f"{len(written)} files written to {folder}.")


def _checks(outputs: Path) -> dict[str, Callable[[xr.Dataset, str], None]]:
    """The contract of each store of the study that is there, by its name."""
    from pipeline.results import contracts

    checks = {
        "timing": contracts.validate_timing,
        "simulation": contracts.validate_timing,
        "accuracy": contracts.validate_accuracy,
        "calibration": contracts.validate_calibration,
        "miscalibration": contracts.validate_miscalibration,
    }
    return {name: check for name, check in checks.items() if (outputs / f"{name}.zarr").exists()}


def report(
    outputs: OutputsArgument = Path("outputs"),
    output: Annotated[Path | None, typer.Option("--output", help="File, OUTPUTS/report.html if not given.")] = None,
    snakefile: Annotated[Path, typer.Option("--snakefile", help="The workflow that made the study.")] = Path(
        "Snakefile"
    ),
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Folder of another study, such as one in outputs/reference: compare with it."),
    ] = None,
) -> None:
    """Write the report on a finished study as one HTML file, which needs no network.

    With --against a page beside it, compared.html, that sets the study beside another one instead.
    """
    if against is not None:
        _compare(outputs, against, (output or outputs / "report.html").with_name("compared.html"))
        return
    from pipeline.analysis.figures import FIGURES
    from pipeline.analysis.report import write_report
    from pipeline.config import load_config

    study = load_config(outputs / "configuration.yaml")
    targets = [outputs / "figures" / name for name in ("headline.html", *(f"{figure}.svg" for figure in FIGURES))]
    for target in targets:
        if not target.exists():
            raise InputError(f"{target} does not exist: finish the study first with snakemake --cores all")
    written = write_report(
        output or outputs / "report.html",
        snakefile=snakefile,
        configuration=study.model_dump(mode="json"),
        targets=targets,
    )
    print(f"Report written to {written}.")


def _compare(outputs: Path, against: Path, output: Path) -> None:
    from pipeline.analysis.comparison import compare, summary_of, write_comparison
    from pipeline.results.contracts import validate_timing
    from pipeline.results.stores import open_store, open_zip

    timing = open_store(outputs / "timing.zarr", validate_timing)
    packed = against / "timing.zarr.zip"
    reference = (
        open_zip(packed, validate_timing) if packed.exists() else open_store(against / "timing.zarr", validate_timing)
    )
    table = compare(timing, reference)
    here, there = (
        f"{folder} ({one.attrs.get('hardware', 'unknown hardware')}, {one.attrs.get('created', 'no date')})"
        for folder, one in ((outputs, timing), (against, reference))
    )
    written = write_comparison(table, output, here=here, there=there)
    print(f"{summary_of(table)} Written to {written}.")


def notebook(
    template: Annotated[Path, typer.Argument(help="The notebook to execute.")],
    outputs: OutputsArgument = Path("outputs"),
    output: Annotated[Path | None, typer.Option("--output", help="File, OUTPUTS/analysis.ipynb if not given.")] = None,
) -> None:
    """Execute the analysis notebook on the stores of a study."""
    from pipeline.analysis.report import execute_notebook

    stores = {name: outputs / f"{name}.zarr" for name in ("timing", "simulation")}
    written = execute_notebook(template, output or outputs / "analysis.ipynb", stores)
    print(f"Executed notebook written to {written}.")
