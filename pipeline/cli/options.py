"""The options that several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.rounds import LONG_STEP_S, MOST_STEPS

NetworkOption = Annotated[
    str,
    typer.Option(
        "--network",
        help="Kernels of two convolutions as K1:K2, a torchvision name, or package.module:factory for your own.",
    ),
]


def _possible_devices(text: str | None) -> str | None:
    """The devices as they are written; refused, before data are fetched, where they are no device set."""
    if text:
        from pipeline.cluster.devices import parse_device_set

        parse_device_set(text)
    return text


DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="SET",
        help="Devices, such as 'cpu', '2 x cpu', '4 x cpu@0.45' (emulated at that speed) or 'gpu + cpu*2t' (two "
        "threads); all there are if not given.",
        callback=_possible_devices,
    ),
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler", metavar="ADDRESS", help="Address or scheduler file of a running Dask cluster to use instead."
    ),
]
RoundsOption = Annotated[
    int,
    typer.Option(
        "--rounds",
        min=1,
        help=f"What is compared is timed in turn, so often; once where all steps take over {LONG_STEP_S:g} s.",
    ),
]
SecondsOption = Annotated[
    float,
    typer.Option(
        "--seconds",
        min=0,
        max=600,
        help=f"Short steps are repeated, up to {MOST_STEPS} times, for about so many s.",
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="auto, cifar10, digits, a folder of images, torchvision:NAME:FOLDER, or a file that `data` wrote.",
    ),
]
ImageSizeOption = Annotated[
    int | None, typer.Option("--image-size", min=1, help="Resize the images to this height and width.")
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images per step over all devices.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the initial weights and of the order of the images.")]
LearningRateOption = Annotated[float, typer.Option("--learning-rate", help="Learning rate of the gradient descent.")]
MomentumOption = Annotated[float, typer.Option("--momentum", help="Momentum of the gradient descent.")]

CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help="File that `calibrate` wrote; calibrates first if not given.")
]
