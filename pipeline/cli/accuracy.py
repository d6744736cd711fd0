"""`accuracy`: does a split network classify as well as one that is trained on a single device?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    SchedulerOption,
    SeedOption,
)
from pipeline.cli.progress import Progress
from pipeline.cli.ranks import checked_strategy, cluster, costs_of, optimizer_of


def accuracy(
    network: NetworkOption,
    strategy: Annotated[list[str], typer.Option("--strategy", help="A strategy to compare; repeat for several.")],
    output: Annotated[Path, typer.Option("--output", help="Store to write, such as accuracy.zarr.")],
    data: DataOption = "auto",
    image_size: ImageSizeOption = None,
    train_images: Annotated[int | None, typer.Option("--train-images", min=1, help="Use at most so many.")] = None,
    test_images: Annotated[int | None, typer.Option("--test-images", min=1, help="Use at most so many.")] = None,
    devices: DevicesOption = None,
    scheduler: SchedulerOption = None,
    batch_size: BatchSizeOption = 64,
    calibration: CalibrationOption = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training images.")] = 1,
    learning_rate: LearningRateOption = 0.01,
    momentum: MomentumOption = 0.9,
    seed: SeedOption = 0,
) -> None:
    """Train the same network by several strategies and compare how well they classify."""
    from pipeline.accuracy import compare_accuracy
    from pipeline.networks import network as build
    from pipeline.results.stores import write_store

    strategies = [checked_strategy(name) for name in strategy]
    with prepared_images(data, image_size, train_images, test_images) as (train, test):
        model = build(network, classes=len(train.classes), image_shape=train.image_shape, seed=seed)
        with cluster(devices, scheduler, network) as (client, members):
            compared = compare_accuracy(
                model,
                train,
                test,
                client,
                members=members,
                network=network,
                batch_size=batch_size,
                strategies=strategies,
                epochs=epochs,
                seed=seed,
                optimizer=optimizer_of(learning_rate, momentum),
                calibration=costs_of(calibration, network, model, train, client, members, batch_size),
                progress=lambda name: Progress(f"{name} {network}", epochs * -(-len(train) // batch_size)),
            )
    write_store(compared, output)
    for name in strategies:
        last = compared.sel(strategy=name).isel(epoch=-1)
        print(f"{name}: test accuracy {100 * float(last.accuracy):.1f} % after epoch {int(last.epoch)}")
