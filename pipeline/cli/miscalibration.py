"""`miscalibration`: what a step loses where the plan comes from a wrong calibration."""

from __future__ import annotations

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

_ERRORS = [-0.5, -0.3, -0.1, 0.0, 0.1, 0.3, 0.5]
_STRATEGIES = ["paper", "kernel"]


def miscalibration(
    network: NetworkOption,
    output: Annotated[Path, typer.Option("--output", help="Store to write, such as miscalibration.zarr.")],
    error: Annotated[
        list[float] | None,
        typer.Option("--error", help="Relative error of the device's judged time, such as -0.3; repeat for several."),
    ] = None,
    device: Annotated[int, typer.Option("--device", min=0, help="The device that is misjudged, by its rank.")] = 1,
    strategy: Annotated[
        list[str] | None, typer.Option("--strategy", help="A strategy that plans by the calibration; repeat.")
    ] = None,
    data: DataOption = "auto",
    image_size: ImageSizeOption = None,
    devices: DevicesOption = None,
    scheduler: SchedulerOption = None,
    batch_size: BatchSizeOption = 64,
    calibration: CalibrationOption = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps before the clock starts.")] = 2,
    rounds: RoundsOption = 3,
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Least number of timed steps.")] = 5,
    seconds: SecondsOption = 1.0,
    learning_rate: LearningRateOption = 0.01,
    momentum: MomentumOption = 0.9,
    seed: SeedOption = 0,
) -> None:
    """Time the training step of plans from calibrations in which one device is judged too slow or too fast."""
    from pipeline.calibration.misjudged import misjudged
    from pipeline.networks import check_name
    from pipeline.networks import network as build
    from pipeline.results.provenance import provenance
    from pipeline.results.stores import combine_errors, write_store
    from pipeline.run.benchmark import Bench, measure_cells

    strategies = [checked_strategy(name) for name in dict.fromkeys(strategy or _STRATEGIES)]
    errors = sorted(set(error if error is not None else _ERRORS))
    optimizer = optimizer_of(learning_rate, momentum)
    check_name(network)
    with prepared_images(data, image_size, network=network) as (images, _):
        model = build(network, classes=len(images.classes), image_shape=images.image_shape, seed=seed)
        with cluster(devices, scheduler, network) as (client, members):
            right = costs_of(calibration, network, model, images, client, members, batch_size)
            benches = {
                wrong: Bench(
                    model=model,
                    dataset=images,
                    client=client,
                    members=members,
                    network=network,
                    batch_size=batch_size,
                    device_set=device_set_of(members),
                    calibration=right,
                    believed=misjudged(right, device, wrong),
                    seed=seed,
                    optimizer=optimizer,
                )
                for wrong in errors
            }
            cells = measure_cells(
                {(wrong, name): (benches[wrong], name) for name in strategies for wrong in errors},
                rounds=rounds,
                repetitions=repetitions,
                seconds=seconds,
                warmup=warmup,
                progressing=lambda cell: Progress(f"{cell[1]} {network}, misjudged by {cell[0]:+.0%}", None),
            )
    store = combine_errors({wrong: [cells[wrong, name] for name in strategies] for wrong in errors})
    choice = {
        "warmup": warmup, "rounds": rounds, "repetitions": repetitions, "seconds": seconds, "seed": seed,
        "optimizer": "SGD", "learning_rate": learning_rate, "momentum": momentum,
    }  # fmt: skip
    store.attrs = provenance(
        choice,
        emulated=any(member.device.emulated for member in members),
        data=images.source_name,
        threads={member.name: member.device.threads for member in members},
        hardware=[member.hardware for member in members],
    ) | {"misjudged_device": device}
    write_store(store, output)
    _show(store)


def _show(store: xr.Dataset) -> None:
    """The median step of each strategy over the error, a line for each."""
    one = store.isel(network=0, batch_size=0, device_set=0, link=0)
    for name in one.strategy.values:
        medians = one.step_time.sel(strategy=name).median("repetition")
        told = ", ".join(f"{float(m.error):+.0%} {float(m):.4g} s" for m in medians)
        print(f"{name}, step over the error of device {store.attrs['misjudged_device']}: {told}")
