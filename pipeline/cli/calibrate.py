"""`calibrate`: what each device needs for each part of a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.images import prepared_images
from pipeline.cli.options import (
    BatchSizeOption,
    DataOption,
    DevicesOption,
    ImageSizeOption,
    NetworkOption,
    SchedulerOption,
)
from pipeline.cli.ranks import cluster, device_set_of, say_if_cached
from pipeline.progress import Progress


def calibrate(
    network: NetworkOption,
    output: Annotated[Path, typer.Option("--output", help="File to write, such as calibration.zarr.zip.")],
    devices: DevicesOption = None,
    scheduler: SchedulerOption = None,
    data: DataOption = "auto",
    image_size: ImageSizeOption = None,
    batch_size: BatchSizeOption = 64,
    fraction: Annotated[
        list[float] | None, typer.Option("--fraction", help="A share of the kernels to measure; repeat for several.")
    ] = None,
    repetitions: Annotated[
        int, typer.Option("--repetitions", min=1, help="Measurements of each share, more where they differ.")
    ] = 2,
    force: Annotated[bool, typer.Option("--force", help="Measure even if the same was measured before.")] = False,
) -> None:
    """Measure how long each device takes for each segment of a network, and each link for a message."""
    from pipeline.calibration.cache import cache_folder
    from pipeline.calibration.measure import FRACTIONS
    from pipeline.calibration.measure import calibrate as measure
    from pipeline.networks import check_name
    from pipeline.networks import network as build
    from pipeline.plan.costs import Costs
    from pipeline.results.contracts import validate_calibration
    from pipeline.results.stores import write_zip
    from pipeline.run.launch import example_batch

    check_name(network)
    with (
        prepared_images(data, image_size, network=network) as (images, _),
        cluster(devices, scheduler, network) as (client, members),
    ):
        model = build(network, classes=len(images.classes), image_shape=images.image_shape)
        with Progress(f"calibrate {network}", None) as progress:
            calibration = measure(
                model,
                example_batch(images),
                client,
                members=members,
                network=network,
                batch_size=batch_size,
                fractions=fraction or FRACTIONS,
                repetitions=repetitions,
                cache=cache_folder(),
                force=force,
                on_progress=progress,
            )
        calibration = calibration.assign_coords(device_set=device_set_of(members))
    say_if_cached(calibration)
    validate_calibration(calibration)
    write_zip(calibration, output)
    costs = Costs.of(calibration)
    print(f"Calibrated {network} on {device_set_of(members)}; images per second of each device, batch {batch_size}:")
    for rank, member in enumerate(members):
        print(f"  {member.name} {member.device.label}: {costs.throughputs(batch_size)[rank]:.1f}")
