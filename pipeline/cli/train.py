"""`train`: one network on many devices."""

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
    LearningRateOption,
    MomentumOption,
    NetworkOption,
    SchedulerOption,
    SeedOption,
)
from pipeline.cli.progress import Progress
from pipeline.cli.ranks import checked_strategy, cluster, optimizer_of
from pipeline.errors import InputError


def train(
    network: NetworkOption,
    data: DataOption = "auto",
    image_size: ImageSizeOption = None,
    devices: DevicesOption = None,
    scheduler: SchedulerOption = None,
    strategy: Annotated[
        str, typer.Option("--strategy", help="How to split: single, ddp, equal, paper, kernel or auto.")
    ] = "auto",
    shares: Annotated[
        str | None,
        typer.Option(
            "--shares", help="Part of every layer for each device, such as 0.7,0.3, instead of a calibration."
        ),
    ] = None,
    batch_size: BatchSizeOption = 64,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training images.")] = 1,
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="Stop after so many steps.")] = None,
    learning_rate: LearningRateOption = 0.01,
    momentum: MomentumOption = 0.9,
    seed: SeedOption = 0,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="File for the trained weights, an ordinary state dict.")
    ] = None,
) -> None:
    """Train a network with its layers split over unequal devices."""
    from pipeline.networks import network as build
    from pipeline.training import fit

    chosen = checked_strategy(strategy)
    with prepared_images(data, image_size) as (images, test_images):
        model = build(network, classes=len(images.classes), image_shape=images.image_shape, seed=seed)
        with cluster(devices, scheduler) as (client, members):
            steps = max_steps or epochs * -(-len(images) // batch_size)
            with Progress(f"train {network}", steps) as progress:
                result = fit(
                    model,
                    images,
                    client,
                    members=members,
                    batch_size=batch_size,
                    epochs=epochs,
                    max_steps=max_steps,
                    strategy=chosen,
                    shares=_parsed_shares(shares),
                    optimizer=optimizer_of(learning_rate, momentum),
                    seed=seed,
                    validation=test_images,
                    checkpoint=checkpoint,
                    on_progress=progress,
                )
    print(result.plan.table())
    history, step_time = result.history, result.timing.step_time
    print(
        f"{history.sizes['step']} steps of {float(step_time.median()):.3g} s (median), "
        f"loss {float(history.loss[0]):.4f} at first and {float(history.loss[-1]):.4f} at last."
    )
    for epoch, accuracy in zip(history.epoch.values, history.accuracy.values, strict=True):
        print(f"Test accuracy after epoch {epoch}: {100 * accuracy:.1f} %")
    if checkpoint is not None:
        print(f"Weights written to {checkpoint}.")


def _parsed_shares(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"the shares {text!r} are not numbers with commas between them, such as 0.7,0.3") from None
