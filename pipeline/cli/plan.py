"""`plan`: how a network would be split over devices, and what that would take."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
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
_LAYOUTS = {
    "M": "all on the first device",
    "R": "a copy on each",
    "K": "kernels or channels split",
    "B": "images split",
    "P": "a summand on each",
}


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
    from pipeline.plan.files import write_plan
    from pipeline.plan.planner import plan_graph
    from pipeline.plan.summary import summarise
    from pipeline.results.contracts import validate_calibration
    from pipeline.results.stores import open_zip
    from pipeline.run.launch import example_batch

    chosen = checked_strategy(strategy)
    check_name(network)
    if output is not None and (output.is_dir() or not output.resolve().parent.is_dir()):
        raise InputError(f"the plan cannot be written to {output}: name a file in a folder that exists")
    with prepared_images(data, image_size, network=network) as (images, _):
        model = build(network, classes=len(images.classes), image_shape=images.image_shape)
        graph = trace(model, example_batch(images))
        if calibration is not None and devices is None and scheduler is None:
            measured = open_zip(calibration, validate_calibration)  # of devices that need not be here
        else:
            with cluster(devices, scheduler, network) as (client, members):
                measured = costs_of(calibration, network, model, images, client, members, batch_size, graph)
    labels = [str(label) for label in measured.device_label.values]
    made = plan_graph(graph, measured, batch_size=batch_size, strategy=chosen, labels=labels)
    show(made, summarise(graph, made, Costs.of(measured), all_labels=labels))
    if output is not None:
        write_plan(made, output)
        print(f"Plan written to {output}.")


def show(made: Plan, summary: Summary) -> None:
    """Print a plan as a table, with what it is predicted to take below."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Where no terminal says how wide it is, lines that fit the usual table, and sentences that do not break.
    terminal = sys.stdout.isatty()
    console = Console(highlight=False, markup=False, width=None if terminal else _WIDTH)
    title = f"{made.strategy} over {_counted(made.labels)}, batch {made.batch_size}"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE)
    for name in ("operation", "layout"):
        table.add_column(name, overflow="fold")
    for name in ("shares", "time / ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("sent / MB", "exchange / ms") if made.ranks > 1 else ():
        table.add_column(name, justify="right", no_wrap=True)
    rows = _joined(summary.rows)
    shares = _aligned([[float(one) for one in row.shares] for row in rows], ".0f")
    times = _aligned([[1e3 * one for one in row.seconds] for row in rows], ".2f")
    for row, *own in zip(rows, shares, times, strict=True):
        sent = row.exchanged_bytes
        exchange = [f"{sent / 1e6:.2f}", f"{1e3 * row.exchange_seconds:.2f}"] if sent else ["", ""]
        table.add_row(*map(Text, (row.operation, row.layouts, *own, *(exchange if made.ranks > 1 else ()))))
    console.print(table)
    for part in made.opaque:
        console.print(f"As it is, on one device: {part}.", soft_wrap=not terminal)
    for line in _sentences(made, summary):
        console.print(line, soft_wrap=not terminal)


def _sentences(made: Plan, summary: Summary) -> list[str]:
    """What a plan means, a line each."""
    kinds = {kind for row in summary.rows for kind in row.layouts.split(" → ")}
    few, lines = made.ranks <= _DEVICES_SHOWN, []
    if made.ranks > 1:
        order = "of each device in turn" if few else "the least and the most of a device"
        lines.append(f"Shares and times are {order}; times and what is sent, outputs and weights, are of both passes.")
        lines.append(f"Layouts: {', '.join(f'{kind} {means}' for kind, means in _LAYOUTS.items() if kind in kinds)}.")
    if made.strategy == "ddp":
        lines.append("Gradients are summed beside the backward pass: the exchange is what that makes the step longer.")
    baseline = summary.baseline if summary.baseline_fits else f"{summary.baseline}, which cannot hold the network"
    lines.append(
        f"Predicted step: {1e3 * summary.step_seconds:.4g} ms; the fastest device alone, {baseline}, takes "
        f"{1e3 * summary.baseline_seconds:.4g} ms."
    )
    lines.append(
        f"Speedup: {summary.speedup:.2f}x; all devices together would allow {summary.bound:.2f}x{_beyond(summary)}."
    )
    mebibytes = [one / 2**20 for one in summary.memory]
    shown = ", ".join(f"{one:.0f}" for one in mebibytes) if few else _range(mebibytes, ".0f")
    lines.append(f"Memory per device, beyond its process and the images: {shown} MiB.")
    if limited := [f"{made.devices[rank]} ({made.labels[rank]})" for rank in summary.limited_by_memory]:
        lines.append(f"Memory limits the share of device {', '.join(limited)}.")
    if made.channels_last:
        lines.append("All devices keep their tensors with the channels last in memory, which was measured as faster.")
    lines.append(f"What limits: {summary.limit}.")
    if summary.helps:
        lines.append(f"What would help, as speedup over {summary.baseline} alone, now {summary.speedup:.2f}x:")
        lines += [f"  {one.change}: {summary.baseline_seconds / one.step_seconds:.2f}x" for one in summary.helps]
    return lines


def _beyond(summary: Summary) -> str:
    """Why a plan may be predicted to gain more than its devices are faster together; empty where it does not."""
    if round(summary.speedup, 2) <= round(summary.bound, 2):  # as they are shown
        return ""
    return ", had not one device alone taken longer than the same work in parts"


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
    """The devices in order, those of one label that follow each other counted."""
    groups = [(label, len(list(group))) for label, group in groupby(labels)]
    return " + ".join(label if count == 1 else f"{count} x {label}" for label, count in groups)


def _aligned(rows: Sequence[Sequence[float]], form: str) -> list[str]:
    """A row of numbers as text each, below each other, ``-`` for none; of many devices the least and the most."""
    if len(rows[0]) > _DEVICES_SHOWN:
        return [_range(row, form) for row in rows]
    texts = [[f"{one:{form}}" if one else "-" for one in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in texts]


def _range(numbers: Sequence[float], form: str) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"
