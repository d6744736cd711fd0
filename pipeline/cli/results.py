"""`combine`: from one file per job to the stores of the study."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import InputError


def combine(
    files: Annotated[list[Path], typer.Argument(help="Files that `benchmark` wrote, or that `calibrate` wrote.")],
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
