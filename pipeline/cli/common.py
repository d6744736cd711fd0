"""What the commands share: their options, the cluster they run on, the images they train on, progress."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import xarray as xr
    from distributed import Client
    from torch import nn

    from pipeline.cluster.devices import Member
    from pipeline.datasets import StoredImages

NetworkOption = Annotated[
    str, typer.Option("--network", help="Kernels of two convolutions as K1:K2, or a torchvision name.")
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="SET",
        help="Devices, such as 'cpu', '2 x cpu', '4 x cpu@0.45' (emulated at that speed) or 'gpu + cpu*2t' (two "
        "threads); all there are if not given.",
    ),
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler", metavar="ADDRESS", help="Address or scheduler file of a running Dask cluster to use instead."
    ),
]
DataOption = Annotated[
    str,
    typer.Option("--data", help="auto, cifar10, digits, a folder of images, or a file that `data` wrote."),
]
ImageSizeOption = Annotated[
    int | None, typer.Option("--image-size", min=1, help="Resize the images of a folder to this height and width.")
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images per step over all devices.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the initial weights and of the order of the images.")]
LearningRateOption = Annotated[float, typer.Option("--learning-rate", help="Learning rate of the gradient descent.")]
MomentumOption = Annotated[float, typer.Option("--momentum", help="Momentum of the gradient descent.")]

CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help="File that `calibrate` wrote; calibrates first if not given.")
]

_LINE_INTERVAL_S = 5.0


def say(text: str) -> None:
    """A line about what happens, on standard error, as standard output is for results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def cluster(devices: str | None, scheduler: str | None) -> Iterator[tuple[Client, tuple[Member, ...]]]:
    """A client, and the members to run on: the devices asked for, or all of the machine or the cluster.

    Raises:
        InputError: The devices are no device set or not there, or the scheduler cannot be reached.
    """
    from pipeline.cluster.deployment import connect, local_cluster
    from pipeline.cluster.devices import discover, parse_device_set, select

    wanted = parse_device_set(devices) if devices else None
    with connect(scheduler) if scheduler else local_cluster(wanted) as client:
        if client.dashboard_link:
            print(f"Dashboard: {client.dashboard_link}", flush=True)
        members = discover(client)
        yield client, select(members, wanted) if wanted else members


def device_set_of(members: tuple[Member, ...]) -> str:
    """The canonical text of the members' devices."""
    from pipeline.cluster.devices import format_device_set

    return format_device_set([member.device for member in members])


@contextmanager
def prepared_images(
    data: str, image_size: int | None = None, train_limit: int | None = None, test_limit: int | None = None
) -> Iterator[tuple[StoredImages, StoredImages]]:
    """Training and test images, at most so many: of a prepared file, or prepared for the length of the block."""
    from pipeline.datasets import StoredImages, prepare

    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        path = Path(data)
        if not path.is_file():
            path = Path(folder, "images.zarr.zip")
            prepare(data, path, root=download_folder(), image_size=image_size, progress=sys.stderr.isatty())
        yield StoredImages(path, "train", train_limit), StoredImages(path, "test", test_limit)


def download_folder() -> Path:
    """Where downloaded data sets are kept for all projects of this user."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "pipeline" if base else Path.home() / ".cache" / "pipeline"


def costs_of(
    path: Path | None,
    network: str,
    model: nn.Module,
    images: StoredImages,
    client: Client,
    members: tuple[Member, ...],
    batch_size: int,
) -> xr.Dataset:
    """The calibration of the members, read or made."""
    from pipeline.calibration.measure import calibrate
    from pipeline.calibration.subset import of_devices
    from pipeline.results.contracts import validate_calibration
    from pipeline.results.stores import open_zip
    from pipeline.run.launch import example_batch

    if path is not None:
        return of_devices(open_zip(path, validate_calibration), [member.device.label for member in members])
    example = example_batch(images)
    with Progress(f"calibrate {network}", None) as progress:
        return calibrate(
            model, example, client, members=members, network=network, batch_size=batch_size, on_progress=progress
        )


def optimizer_of(learning_rate: float, momentum: float) -> Any:
    """A factory of gradient descent with momentum; travels to the workers."""
    from functools import partial

    import torch

    return partial(torch.optim.SGD, lr=learning_rate, momentum=momentum)


class Progress:
    """Steps done of a total: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, title: str, total: int | None) -> None:
        self._title, self._total = title, total
        self._last_line_s = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._title, total=self._total, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, values: Mapping[str, float]) -> None:
        """Show that `done` steps are done, with the latest values beside; a value `total` says of how many."""
        self._total = int(values.get("total", self._total or 0)) or None
        note = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "total")
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total, note=note)
        elif time.monotonic() - self._last_line_s >= _LINE_INTERVAL_S:
            self._last_line_s = time.monotonic()
            total = f" of {self._total}" if self._total else ""
            say(f"{self._title}: {done}{total}{', ' if note else ''}{note}")
