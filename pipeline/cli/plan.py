"""`plan`: how a network would be split over devices, and what that would take."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.images import prepared_images
from pipeline.cli.options import (
    BatchSizeOption,
    CalibrationOption,
    DataOption,
    DevicesOption,
    ImageSizeOption,
    NetworkOption,
    SchedulerOption,
)
from pipeline.cli.ranks import checked_strategy, cluster, costs_of
from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan
    from pipeline.plan.summary import Row, Summary

_DEVICES_SHOWN = 6
_WIDTH = 120


def plan(
    network: NetworkOption,
    devices: DevicesOption = None,
    scheduler: SchedulerOption = None,
    data: DataOption = "auto",
    image_size: ImageSizeOption = None,
    batch_size: BatchSizeOption = 64,
    strategy: Annotated[
        str, typer.Option("--strategy", help="How to split: single, ddp, equal, paper, kernel, batch or auto.")
    ] = "auto",
    calibration: CalibrationOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="JSON file to write the plan to, for `train --plan`.")
    ] = None,
) -> None:
    """Plan how a network is split over devices: shares, times and exchanges per layer, what limits, what would help."""
    from pipeline.graph.trace import trace
    from pipeline.networks import check_name
    from pipeline.networks import network as build
    from pipeline.plan.costs import Costs
    from pipeline.plan.files import plan_to_json
    from pipeline.plan.planner import plan_graph
    from pipeline.plan.summary import summarise
    from pipeline.results.contracts import validate_calibration
    from pipeline.results.stores import open_zip
    from pipeline.run.launch import example_batch

    chosen = checked_strategy(strategy)
    check_name(network)
    if output is not None and (output.is_dir() or not output.resolve().parent.is_dir()):
        raise InputError(f"the plan cannot be written to {output}: name a file in a folder that exists")
    with prepared_images(data, image_size) as (images, _):
        model = build(network, classes=len(images.classes), image_shape=images.image_shape)
        if calibration is not None and devices is None and scheduler is None:
            measured = open_zip(calibration, validate_calibration)  # of devices that need not be here
        else:
            with cluster(devices, scheduler, network) as (client, members):
                measured = costs_of(calibration, network, model, images, client, members, batch_size)
        graph = trace(model, example_batch(images))
    labels = [str(label) for label in measured.device_label.values]
    made = plan_graph(graph, measured, batch_size=batch_size, strategy=chosen, labels=labels)
    show(made, summarise(graph, made, Costs.of(measured), all_labels=labels))
    if output is not None:
        output.write_text(plan_to_json(made), encoding="utf-8")
        print(f"Plan written to {output}.")


def show(made: Plan, summary: Summary) -> None:
    """Print a plan as a table, with what it is predicted to take below."""
    from rich.console import Console
    from rich.table import Table

    few = made.ranks <= _DEVICES_SHOWN
    table = Table(title=f"{made.strategy} over {_counted(made.labels)}, batch {made.batch_size}", title_justify="left")
    for name in ("operation", "layout"):
        table.add_column(name, overflow="fold")
    for name in ("shares", "time per device / ms", "moved / MB", "exchange / ms"):
        table.add_column(name, justify="right")
    for row in _joined(summary.rows):
        milliseconds = [1e3 * one for one in row.seconds]
        table.add_row(
            row.operation,
            row.layouts,
            " ".join(map(str, row.shares)) if few else _range([float(one) for one in row.shares], "g"),
            " ".join(f"{one:.2f}" for one in milliseconds) if few else _range(milliseconds, ".2f"),
            f"{row.exchanged_bytes / 1e6:.2f}" if row.exchanged_bytes else "",
            f"{1e3 * row.exchange_seconds:.2f}" if row.exchange_seconds else "",
        )
    # Where no terminal says how wide it is, lines that fit the usual table.
    Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH).print(table)
    print(
        f"Predicted step: {1e3 * summary.step_seconds:.4g} ms, {summary.speedup:.2f}x the fastest device alone "
        f"({summary.baseline}); all devices together would allow {summary.bound:.2f}x."
    )
    mebibytes = [one / 2**20 for one in summary.memory]
    shown = ", ".join(f"{one:.0f}" for one in mebibytes) if few else _range(mebibytes, ".0f")
    print(f"Memory per device, beyond its process and the images: {shown} MiB.")
    if made.channels_last:
        print("All devices keep their tensors with the channels last in memory, which was measured to be faster.")
    print(f"What limits: {summary.limit}.")
    for one in summary.helps:
        print(f"What would help: {one.change}: {one.speedup:.2f}x.")


def _joined(rows: Sequence[Row]) -> list[Row]:
    """Operations that were measured together with the one before, as one row."""
    found: list[Row] = []
    for row in rows:
        before = found[-1] if found else None
        if before is None or any(row.seconds) or row.layouts not in before.layouts:
            found.append(row)
            continue
        found[-1] = replace(
            before,
            operation=f"{before.operation}, {row.operation}",
            exchanged_bytes=before.exchanged_bytes + row.exchanged_bytes,
            exchange_seconds=before.exchange_seconds + row.exchange_seconds,
        )
    return found


def _counted(labels: tuple[str, ...]) -> str:
    counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
    return " + ".join(label if count == 1 else f"{count} x {label}" for label, count in counts.items())


def _range(numbers: list[float], form: str) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"
