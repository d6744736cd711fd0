"""`accuracy`: does a split network classify as well as one that is trained on a single device?"""

from __future__ import annotations

import hashlib
import json
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
    SchedulerOption,
)
from pipeline.cli.ranks import checked_strategy, cluster, costs_of, device_set_of, optimizer_of
from pipeline.errors import InputError
from pipeline.progress import Progress

if TYPE_CHECKING:
    import xarray as xr

    from pipeline.stored_images import StoredImages


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
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Of the initial weights and of the order of the images; repeat for several, or 0."),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", help="Folder for each finished training: stopped, the same command goes on from there."),
    ] = None,
) -> None:
    """Train the same network by several strategies, for several seeds, and compare how well they classify."""
    from pipeline.accuracy import compare_accuracy
    from pipeline.networks import check_name
    from pipeline.networks import network as build
    from pipeline.results.kept import Kept
    from pipeline.results.stores import write_store

    strategies, seeds = [checked_strategy(name) for name in strategy], seed or [0]
    given: dict[str, list[object]] = {"--strategy": [*strategies], "--seed": [*seeds]}
    for option, values in given.items():
        if twice := [one for one in values if values.count(one) > 1]:
            raise InputError(f"{option} {twice[0]} is given twice: give each once")
    check_name(network)
    with (
        prepared_images(data, image_size, train_images, test_images, network=network) as (train, test),
        cluster(devices, scheduler, network) as (client, members),
    ):
        first = build(network, classes=len(train.classes), image_shape=train.image_shape)
        costs = costs_of(calibration, network, first, train, client, members, batch_size)
        made_from = [
            network, batch_size, device_set_of(members), epochs, learning_rate, momentum, len(train), len(test)
        ]  # fmt: skip
        compared = compare_accuracy(
            lambda one: build(network, classes=len(train.classes), image_shape=train.image_shape, seed=one),
            train,
            test,
            client,
            members=members,
            network=network,
            batch_size=batch_size,
            strategies=strategies,
            epochs=epochs,
            seeds=seeds,
            optimizer=optimizer_of(learning_rate, momentum),
            calibration=costs,
            kept=Kept(keep, _origin(made_from, train, costs)) if keep is not None else None,
            progress=lambda name: Progress(name, epochs * -(-len(train) // batch_size)),
        )
    write_store(compared, output)
    for name in strategies:
        last = 100 * compared.accuracy.sel(strategy=name).isel(epoch=-1)
        spread = f" ({float(last.min()):.1f} to {float(last.max()):.1f} % over {len(seeds)} seeds)"
        print(
            f"{name}: test accuracy {float(last.mean()):.1f} % after epoch {epochs}{spread if len(seeds) > 1 else ''}"
        )


def _origin(choices: list[object], images: StoredImages, calibration: xr.Dataset) -> str:
    """A digest of all that a training depends on but its seed and strategy: choices, images, calibration and code."""
    from pipeline.workflow.code import code_digest

    with images.path.open("rb") as file:
        pixels = hashlib.file_digest(file, "sha256").hexdigest()
    measured = calibration.drop_attrs()  # the attributes say where it was read from, too
    content = [choices, pixels, measured.to_dict(), code_digest("pipeline.accuracy")]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
