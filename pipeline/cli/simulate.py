"""`simulate`: a grid of networks, batch sizes, devices, links and strategies, from calibrations alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pipeline.cli.options import SchedulerOption
from pipeline.cli.ranks import checked_strategy
from pipeline.errors import InputError
from pipeline.progress import Progress

if TYPE_CHECKING:
    import xarray as xr

_T = TypeVar("_T")
_SHOWN = 10
_COUNTS = (1, 2, 3, 4, 16, 64, 256, 1024)
_CPUS_BESIDE = (1, 4)
_ANOTHER_GPU = re.compile(r"gpu\d")


def simulate(
    calibration: Annotated[
        list[Path], typer.Option("--calibration", help="File that `calibrate` wrote; one or more per network.")
    ],
    output: Annotated[Path, typer.Option("--output", help="Store to write, such as simulation.zarr.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="The study's configuration, whose simulation this is then.")
    ] = None,
    network: Annotated[list[str] | None, typer.Option("--network", help="Network; repeat for several.")] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Images per step over all devices; repeat.")
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option("--devices", metavar="SET", help="Devices, such as '64 x cpu' or 'gpu + 8 x cpu'; repeat."),
    ] = None,
    link: Annotated[
        list[str] | None, typer.Option("--link", help="loopback, or such as 1Gbit/s+0.1ms; repeat.")
    ] = None,
    strategy: Annotated[list[str] | None, typer.Option("--strategy", help="Strategy; repeat.")] = None,
    describe: Annotated[
        list[str] | None,
        typer.Option(
            "--describe",
            metavar="NAME=GFLOPS",
            help="A device that is not there, by its GFLOP/s, as gpu=20000 or, with its memory, gpu[24GiB]=20000.",
        ),
    ] = None,
    scheduler: SchedulerOption = None,
) -> None:
    """Simulate training steps on up to 1,024 calibrated or described devices, over links of any speed."""
    from pipeline.cluster.deployment import connect
    from pipeline.config import load_config
    from pipeline.plan.checks import check_single
    from pipeline.results.stores import open_zip, write_store
    from pipeline.simulation.sweep import Grid, sweep
    from pipeline.simulation.workers import simulators

    study = load_config(config if config is not None else {}).simulation
    described = _described(describe) if describe is not None else dict(study.described)
    calibrations = _by_network([open_zip(path, check_single) for path in calibration])
    grid = Grid(
        networks=_each_once(network or study.networks or calibrations),
        batch_sizes=_each_once(batch_size or study.batch_sizes),
        device_sets=_each_once(
            devices or study.device_sets or [*_usual_sets(calibrations, described), *_emulated_sets(calibrations)]
        ),
        links=_each_once(link or study.links),
        strategies=_each_once(checked_strategy(one) for one in strategy or study.strategies),
        described=described,
    )
    with (
        connect(scheduler) if scheduler else simulators() as client,
        Progress("simulate", grid.cells) as progress,
    ):
        found = sweep(grid, calibrations, client, on_progress=lambda done: progress(done, {}))
    write_store(found, output)
    _show(found)
    print(f"{grid.cells} cells simulated, written to {output}.")


def _each_once(values: Iterable[_T]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys(values))


def _by_network(calibrations: list[xr.Dataset]) -> dict[str, list[xr.Dataset]]:
    found: dict[str, list[xr.Dataset]] = {}
    for one in calibrations:
        found.setdefault(str(one.network.item()), []).append(one)
    return found


def _usual_sets(calibrations: dict[str, list[xr.Dataset]], described: dict[str, float]) -> list[str]:
    """One to 1,024 of each real device that was calibrated (of each emulated one, where none is real).

    As many of the first described one; and each described one alone and beside one and four of those.
    """
    labels = dict.fromkeys(
        str(label) for some in calibrations.values() for one in some for label in one.device_label.values
    )
    # Another GPU of the machine, gpu1, is one more of the first, gpu.
    labels = {label: None for label in labels if not _ANOTHER_GPU.match(label)}
    real = [label for label in labels if "@" not in label] or list(labels)
    cpus = [label for label in real if label.startswith("cpu")]
    many = [f"{count} x {name}" if count > 1 else name for name in (*real, *list(described)[:1]) for count in _COUNTS]
    beside = [f"{one} + {count} x {other}" for one in described for other in cpus for count in _CPUS_BESIDE]
    return [*many, *described, *beside]


def _emulated_sets(calibrations: dict[str, list[xr.Dataset]]) -> list[str]:
    """One to 1,024 of each emulated device of which several were calibrated together, each measured number included."""
    together: dict[str, int] = {}
    for one in (one for some in calibrations.values() for one in some):
        for label, count in Counter(map(str, one.device_label.values)).items():
            if "@" in label:
                together[label] = max(count, together.get(label, 0))
    return [
        f"{count} x {label}" if count > 1 else label
        for label, most in together.items()
        if most > 1
        for count in sorted({*_COUNTS, *range(1, most + 1)})
    ]


def _described(texts: list[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        name, _, gflops = text.rpartition("=")
        try:
            found[name.strip()] = float(gflops)
        except ValueError:
            raise InputError(f"description '{text}' is wrong: write NAME=GFLOPS, such as gpu=20000") from None
    return found


def _show(simulated: xr.Dataset) -> None:
    """The fastest strategy of the largest network and batch on the last link, for the first device sets."""
    import numpy as np

    one = simulated.step_time.isel(network=-1, batch_size=-1, link=-1, repetition=0)
    place = f"{simulated.network.values[-1]}, batch {simulated.batch_size.values[-1]}, {simulated.link.values[-1]}"
    print(f"Fastest strategy of {place} (simulated):")
    for index, name in enumerate(simulated.device_set.values[:_SHOWN]):
        times = one.isel(device_set=index)
        if not times.notnull().any():
            continue  # its devices were not calibrated for this network, or cannot hold it
        best = times.isel(strategy=int(np.argmin(times.values)))
        print(f"  {name}: {best.strategy.item()}, {float(best):.4g} s per step")
