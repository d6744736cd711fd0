"""`data`: images, resolved and written once for all jobs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.images import download_folder
from pipeline.cli.options import ImageSizeOption


def data(
    data: Annotated[str, typer.Argument(help="auto, cifar10, digits, a folder of images, or torchvision:NAME:FOLDER.")],
    output: Annotated[Path, typer.Option("--output", help="File to write, such as images.zarr.zip.")],
    image_size: ImageSizeOption = None,
) -> None:
    """Write the images to train on into one file that every other command can read."""
    from pipeline.datasets import prepare

    images = prepare(data, output, root=download_folder(), image_size=image_size, progress=sys.stderr.isatty())
    shape = "x".join(map(str, images.image_shape))
    print(
        f"{images.name}: {len(images.train)} training and {len(images.test)} test images of {shape} "
        f"in {len(images.classes)} classes, written to {output}."
    )
