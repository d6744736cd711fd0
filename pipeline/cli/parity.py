"""`parity`: whether models train to the same result split as whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import InputError, PipelineError, RunError, first_line

if TYPE_CHECKING:
    from pipeline.parity import Parity
    from pipeline.parity_models import Specimen

_COLUMNS = ("model", "strategy", "devices", "loss", "gradients", "weights", "statistics", "split", "on the master")


def parity(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Models: torchvision names, K1:K2, or package.module:factory.", show_default=False),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All classification models of torchvision.")] = False,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=1, help="Height and width of the images; 64 if not given.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to train.")] = 2,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2, help="Images per step.")] = 6,
    output: Annotated[
        Path | None, typer.Option("--output", help="File for the table, in Markdown; it grows with every model.")
    ] = None,
) -> None:
    """Train models a few steps whole and split, in float64, and show how far the results differ."""
    from pipeline.cluster.deployment import local_cluster
    from pipeline.cluster.devices import Device, discover
    from pipeline.networks import check_name
    from pipeline.parity import SHARES, TOLERANCE, check_parity
    from pipeline.parity_models import names

    wanted = [*(models or []), *(names() if every else [])]
    if not wanted:
        raise InputError("no model to compare: name some, such as resnet18, or give --all")
    if output is not None and not output.resolve().parent.is_dir():
        raise InputError(f"the table cannot be written to {output}: its folder does not exist")
    for name in wanted:
        check_name(name)
    lines = _Lines(output)
    failed: list[str] = []
    for name in wanted:
        specimen = _specimen(name, image_size)
        title = f"{name} ({specimen.note})" if specimen.note else name
        exact = True
        try:
            # A cluster for each: what the largest models took is given back.
            with local_cluster([Device("cpu")] * max(map(len, SHARES)), dashboard=False) as client:
                for one in check_parity(
                    specimen.model, specimen.image_shape, client, discover(client), steps=steps, batch_size=batch_size
                ):
                    lines.add(_row(title, one))
                    exact = exact and one.is_exact
        except RunError as error:
            lines.add(f"| {title} | failed: {first_line(error).replace('|', '/')} |" + " |" * (len(_COLUMNS) - 2))
            exact = False
        if not exact:
            failed.append(name)
    if failed:
        some = ", ".join(failed)
        raise PipelineError(f"{len(failed)} of {len(wanted)} models differ by more than {TOLERANCE}: {some}")
    print(f"{len(wanted)} models, split as whole: all differences are below {TOLERANCE}.")


class _Lines:
    """A Markdown table on the screen and, if wanted, in a file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            path.write_text("", encoding="utf-8")
        self.add("| " + " | ".join(_COLUMNS) + " |")
        self.add("|" + " --- |" * len(_COLUMNS))

    def add(self, line: str) -> None:
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _row(name: str, one: Parity) -> str:
    devices = " : ".join(f"{share:g}" for share in one.shares)
    differences = (f"{value:.1e}" for value in (one.loss, one.gradients, one.weights, one.statistics))
    split = "none" if math.isnan(one.split) else f"{100 * one.split:.1f} %"
    left = "; ".join(map(str, one.opaque[:3])) or "none"
    more = f"; {len(one.opaque) - 3} more" if len(one.opaque) > 3 else ""
    return "| " + " | ".join([name, one.strategy, devices, *differences, split, left + more]) + " |"


def _specimen(name: str, image_size: int | None) -> Specimen:
    """The model to compare: torchvision's as the table has it, unless other images are wanted."""
    from pipeline.networks import network
    from pipeline.parity_models import Specimen, names, specimen

    if image_size is None and name in names():
        return specimen(name)
    shape = (3, image_size or 64, image_size or 64)
    return Specimen(network(name, classes=10, image_shape=shape), shape, "")
