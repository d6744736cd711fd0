"""`benchmark`: the time of a training step, by strategy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.images import prepared_images
from pipeline.cli.options import (
    BatchSizeOption,
    CalibrationOption,
    DataOption,
    DevicesOption,
    ImageSizeOption,
    LearningRateOption,
    MomentumOption,
    NetworkOption,
    RoundsOption,
    SchedulerOption,
    SecondsOption,
    SeedOption,
)
from pipeline.cli.ranks import checked_strategy, cluster, costs_of, device_set_of, optimizer_of
from pipeline.progress import Progress

if TYPE_CHECKING:
    import xarray as xr

    from pipeline.cluster.devices import Member

_ALL = ["single", "ddp", "equal", "paper", "kernel", "batch", "auto"]


def benchmark(
    network: NetworkOption,
    strategy: Annotated[
        list[str] | None,
        typer.Option("--strategy", help=f"{', '.join(_ALL)}; repeat for several, all of them if not given."),
    ] = None,
    data: DataOption = "auto",
    image_size: ImageSizeOption = None,
    devices: DevicesOption = None,
    scheduler: SchedulerOption = None,
    batch_size: BatchSizeOption = 64,
    link: Annotated[
        str, typer.Option("--link", help="loopback as it is, or one to emulate, such as 1Gbit/s+0.1ms.")
    ] = "loopback",
    calibration: CalibrationOption = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps before the clock starts.")] = 2,
    rounds: RoundsOption = 3,
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Least number of timed steps.")] = 5,
    seconds: SecondsOption = 1.0,
    learning_rate: LearningRateOption = 0.01,
    momentum: MomentumOption = 0.9,
    seed: SeedOption = 0,
    reference: Annotated[
        bool, typer.Option("--reference", help="Also time a plain torch loop with as many threads as the first device.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write each strategy's cell to, as STRATEGY.zarr.zip.")
    ] = None,
) -> None:
    """Time the training step of a network, one or several strategies on the same devices."""
    from pipeline.links import LOOPBACK, canonical_link
    from pipeline.networks import check_name
    from pipeline.networks import network as build
    from pipeline.run.benchmark import Bench, measure_cells
    from pipeline.run.reference import plain_step_times

    strategies = list(dict.fromkeys(checked_strategy(name) for name in strategy or _ALL))
    link = canonical_link(link)
    optimizer = optimizer_of(learning_rate, momentum)
    check_name(network)
    with prepared_images(data, image_size, network=network) as (images, _):
        model = build(network, classes=len(images.classes), image_shape=images.image_shape, seed=seed)
        with cluster(devices, scheduler, network) as (client, members):
            bench = Bench(
                model=model,
                dataset=images,
                client=client,
                members=members,
                network=network,
                batch_size=batch_size,
                device_set=device_set_of(members),
                calibration=costs_of(calibration, network, model, images, client, members, batch_size),
                link=link,
                seed=seed,
                optimizer=optimizer,
            )
            cells: Mapping[str, xr.Dataset] = measure_cells(
                {name: (bench, name) for name in strategies},
                rounds=rounds,
                repetitions=repetitions,
                seconds=seconds,
                warmup=warmup,
                progressing=lambda name: Progress(f"{name} {network}", None),
            )
        choice = {
            "warmup": warmup, "rounds": rounds, "repetitions": repetitions, "seconds": seconds, "seed": seed,
            "optimizer": "SGD", "learning_rate": learning_rate, "momentum": momentum,
        }  # fmt: skip
        if output is not None:
            for name, cell in cells.items():
                _write(cell, output / f"{name}.zarr.zip", choice, images.source_name, members)
            return
        plain = None
        if reference:
            x_BCHW, y_B = images.batch(range(batch_size))
            threads, times = members[0].device.threads, max(cell.sizes["repetition"] for cell in cells.values())
            plain = plain_step_times(
                model, x_BCHW, y_B, optimizer, threads=threads, warmup=warmup, repetitions=max(repetitions, times)
            )
    over = "" if link == LOOPBACK else f" over {link} (emulated)"
    print(f"{network}, batch {batch_size}, {device_set_of(members)}{over}, {images.source_name}")
    _print_table(cells, plain)


def _write(cell: xr.Dataset, output: Path, choice: dict[str, Any], data: str, members: tuple[Member, ...]) -> None:
    """Write the cell with its provenance, and say in a line what was measured."""
    from pipeline.links import parse_link
    from pipeline.results.provenance import provenance
    from pipeline.results.stores import write_cell

    cell.attrs |= provenance(
        choice,
        emulated=any(member.device.emulated for member in members) or parse_link(cell.link.item()) is not None,
        data=data,
        threads={member.name: member.device.threads for member in members},
        hardware=[member.hardware for member in members],
    )
    write_cell(cell, output)
    name = f"{cell.strategy.item()} on {cell.device_set.item()}: {cell.network.item()}, batch {cell.batch_size.item()}"
    if not cell.sizes["repetition"]:
        print(f"{name}: {cell.status.item()}")
        return
    lower, median, upper = cell.step_time.quantile((0.25, 0.5, 0.75)).values
    print(f"{name}: {median:.4g} s per step (quartiles {lower:.4g} to {upper:.4g} s)")


def _print_table(cells: Mapping[str, xr.Dataset], plain: list[float] | None) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    times: dict[str, Any] = {name: cell.step_time.values for name, cell in cells.items()}
    if plain is not None:
        times["plain torch loop"] = np.array(plain)
    medians = {name: float(np.median(values)) for name, values in times.items() if len(values)}
    bases = {name: medians[name] for name in ("single", "plain torch loop") if name in medians}
    table = Table("strategy", "step in s", "quartiles in s", *(f"speedup over {name}" for name in bases), "status")
    for name, values in times.items():
        status = str(cells[name].status.item()) if name in cells else "ok"
        if name in medians:
            lower, upper = np.quantile(values, (0.25, 0.75))
            speedups = (f"{base / medians[name]:.2f}" for base in bases.values())
            table.add_row(name, f"{medians[name]:.4f}", f"{lower:.4f} to {upper:.4f}", *speedups, status)
        else:
            table.add_row(name, "", "", *("" for _ in bases), status)
    Console().print(table)
