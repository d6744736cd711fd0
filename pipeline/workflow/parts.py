"""What the jobs of a run consist of: parts that end with a file each, and about how long each takes.

The times are rough: work over the speed of the devices, for cores of some years ago. `pipeline.workflow.progress`
corrects them by what the parts of the run took so far.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.devices import Device, parse_device_set
from pipeline.config import Cell, Config, calibrations, groups, slug
from pipeline.rounds import MOST_STEPS, rounds_of

_CORE_FLOPS = 170e9
_CORES_OF_A_GPU = 40
_FLOPS_OF_OTHER_NETWORKS = 1e9
"""Of an image, forward and backward; nobody's, but the first finished parts soon tell."""
_SECONDS_OF_A_JOB = 7.0
_SECONDS_OF_A_CELL = 2.0
_SECONDS_OF_A_TRAINING = 1.5
_SECONDS_OF_A_STEP = 0.006
"""What starting processes, planning and sending take, whatever the network."""
_SECONDS_OF_RULES = {"simulation": 40.0, "figures": 12.0, "data": 7.0, "notebook": 6.0, "report": 4.0}
_SECONDS_OF_OTHERS = 2.0
_ALL_IMAGES = 50_000
_CONTROL = "control"
_WIDTHS = re.compile(r"(\d+):(\d+)")


KINDS = ("calibrations", "cells", "trainings", "other jobs")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of work."""

    kind: str
    """One of KINDS."""
    file: Path
    """Written, or as new, when the part is done; a directory may stand for it."""
    expected_s: float


def parts_of(study: Config, rule: str, wildcards: Mapping[str, str], output: Sequence[str]) -> list[Part]:
    """The parts of one job, in the order in which it makes them; a job without an output has none.

    Args:
        study: The configuration.
        rule: Name of the job's rule.
        wildcards: Of the job.
        output: Paths of its outputs.
    """
    if not output:
        return []
    file = Path(output[0])
    match rule:
        case "calibrate":
            named = {f"{slug(network)}/{slug(devices)}": (network, devices) for network, devices in calibrations(study)}
            parts = [_part("calibrations", file, _calibration_s(study, *named[wildcards["calibration"]]))]
        case "benchmark":
            group = groups(study)[wildcards["group"]]
            parts = [
                _part("cells", file / f"{cell.strategy}.zarr.zip", expected_s)
                for cell, expected_s in zip(group.cells, _cells_s(study, group.cells, group.timed_steps), strict=True)
            ]
        case "accuracy":
            folder, names = Path(study.outputs, "accuracy"), (*study.accuracy.strategies, _CONTROL)
            parts = [
                _part("trainings", folder / f"seed-{seed}" / f"{name}.zarr.zip", _training_s(study, name))
                for seed in study.accuracy.seeds
                for name in names
            ]
        case "miscalibration":
            return [_part("other jobs", file, _SECONDS_OF_A_JOB + _miscalibration_s(study))]
        case _:
            return [_part("other jobs", file, _SECONDS_OF_RULES.get(rule, _SECONDS_OF_OTHERS))]
    first = parts[0]
    return [_part(first.kind, first.file, first.expected_s + _SECONDS_OF_A_JOB), *parts[1:]]


def _part(kind: str, file: Path, expected_s: float) -> Part:
    return Part(kind=kind, file=file, expected_s=expected_s)


def _step_s(cell: Cell) -> float:
    """Seconds of a training step, if sending were free."""
    speeds = [_speed(device) for device in parse_device_set(cell.device_set)]
    match cell.strategy:
        case "single" | "control":
            together = max(speeds)
        case "ddp" | "equal":
            together = len(speeds) * min(speeds)
        case _:
            together = sum(speeds)
    return _SECONDS_OF_A_STEP + cell.batch_size * _flops(cell.network) / (_CORE_FLOPS * together)


def _training_s(study: Config, strategy: str) -> float:
    chosen = study.accuracy
    cell = Cell(
        network=chosen.network, batch_size=chosen.batch_size, device_set=chosen.device_set, link="", strategy=strategy
    )
    steps = -(-(chosen.train_images or _ALL_IMAGES) // chosen.batch_size)
    return _SECONDS_OF_A_TRAINING + chosen.epochs * steps * _step_s(cell)


def _miscalibration_s(study: Config) -> float:
    chosen = study.miscalibration
    cells = [
        Cell(network=chosen.network, batch_size=chosen.batch_size, device_set=chosen.device_set, link="", strategy=one)
        for one in chosen.strategies
    ]
    return len(chosen.errors) * sum(_cells_s(study, cells, study.timing.repetitions))


def _cells_s(study: Config, cells: Sequence[Cell], repetitions: int) -> list[float]:
    """Seconds of each of the cells of one place, which are timed in the same rounds."""
    steps = [_step_s(cell) for cell in cells]
    rounds = rounds_of(min(steps), study.timing.rounds, repetitions)
    return [
        rounds * (_SECONDS_OF_A_CELL + study.timing.warmup * step)
        + max(repetitions * step, min(study.timing.seconds, MOST_STEPS * step))
        for step in steps
    ]


def _calibration_s(study: Config, network: str, device_set: str) -> float:
    """Seconds that grow with the network only up to a point, as large ones are measured with fewer images."""
    chosen = study.calibration
    slowness = sum(1 / _speed(device) for device in parse_device_set(device_set))
    effort = sum(chosen.fractions) * (chosen.repetitions + 1) / 8
    return effort * slowness * min(1.4 + 2.6 * _flops(network) / 1e9, 5.5)


def _flops(network: str) -> float:
    """Floating-point operations of one image of 32x32, forward and backward."""
    widths = _WIDTHS.fullmatch(network)
    if widths is None:
        return _FLOPS_OF_OTHER_NETWORKS
    first, second = int(widths[1]), int(widths[2])
    return 3 * 2 * 25 * (3 * first * 28**2 + first * second * 10**2)


def _speed(device: Device) -> float:
    """In cores."""
    return device.speed * (_CORES_OF_A_GPU if device.kind == "gpu" else device.threads)
