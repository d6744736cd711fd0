"""What a calibration says about the time of any operation, exchange or update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pipeline.plan.instructions import Direction

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Cost curves of one calibration, for chosen devices.

    Curves are times of a *fraction* of a segment (of its kernels, or of a dense layer's input features) for the batch
    of the calibration, scaled in proportion to the batch. The least of the repetitions counts: what
    disturbs a measurement only adds to it.
    """

    segments: tuple[str, ...]
    """Names of the calibrated segments: their operations joined by ``+``."""
    batch_size: int
    fractions: NDArray[np.float64]
    """(segment, share), ascending; NaN where a segment was measured at fewer shares."""
    times: NDArray[np.float64]
    """(device, segment, share, direction) in s; direction 0 is forward, 1 backward."""
    latency: NDArray[np.float64]
    """(source, destination) in s."""
    seconds_per_byte: NDArray[np.float64]
    """(source, destination) in s per byte."""
    update: NDArray[np.float64]
    """(device) in s per trained parameter."""

    @classmethod
    def of(cls, calibration: xr.Dataset) -> Costs:
        """The costs of all devices of one network's calibration."""
        least = calibration[["forward_time", "backward_time", "update_time"]].min("repetition")
        both = (least.forward_time, least.backward_time)
        times = np.stack([way.transpose("device", "segment", "share").values for way in both], axis=-1)
        kernels = calibration.kernels.transpose("segment", "share")
        return cls(
            segments=tuple(str(name) for name in calibration.segment.values),
            batch_size=int(calibration.batch_size),
            fractions=(kernels / kernels.max("share")).values,
            times=times,
            latency=calibration.link_latency.values,
            seconds_per_byte=1 / calibration.link_bandwidth.values,
            update=least.update_time.values,
        )

    def only(self, devices: Sequence[int]) -> Costs:
        """The costs of ``devices`` alone, in that order."""
        chosen = list(devices)
        return replace(
            self,
            times=self.times[chosen],
            latency=self.latency[np.ix_(chosen, chosen)],
            seconds_per_byte=self.seconds_per_byte[np.ix_(chosen, chosen)],
            update=self.update[chosen],
        )

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.times)

    def curve(self, operation: str, total: int, device: int) -> Curve | None:
        """Forward plus backward time in s over the share, ``(points, times)``, of ``operation`` with ``total`` kernels.

        None if the operation does not begin a calibrated segment.
        """
        segment = self._segment(operation)
        if segment is None:
            return None
        measured = np.isfinite(self.fractions[segment]) & np.isfinite(self.times[device, segment, :, 0])
        both = self.times[device, segment].sum(axis=-1)
        return self.fractions[segment][measured] * total, both[measured]

    def seconds(self, operation: str, device: int, fraction: float, direction: Direction, batch_size: int) -> float:
        """Time of ``fraction`` of the segment that ``operation`` begins, for ``batch_size`` images; else 0."""
        segment = self._segment(operation)
        if segment is None or fraction <= 0:
            return 0.0
        times = self.times[device, segment, :, 0 if direction == "forward" else 1]
        measured = np.isfinite(self.fractions[segment]) & np.isfinite(times)
        time = np.interp(fraction, self.fractions[segment][measured], times[measured])
        return float(time) * batch_size / self.batch_size

    def whole_step(self, device: int, batch_size: int) -> float:
        """Forward and backward of the whole network on ``device`` alone, in s."""
        beginnings = [name.split("+", 1)[0] for name in self.segments]
        return sum(
            self.seconds(name, device, 1.0, way, batch_size) for name in beginnings for way in ("forward", "backward")
        )

    def throughput(self, device: int) -> float:
        """Images per second of the whole network on ``device`` alone."""
        return self.batch_size / self.whole_step(device, self.batch_size)

    def fastest(self) -> int:
        """The device with the highest throughput."""
        return max(range(self.devices), key=self.throughput)

    def message(self, source: int, destination: int, size: float) -> float:
        """Time of one message of ``size`` bytes in s."""
        return float(self.latency[source, destination] + size * self.seconds_per_byte[source, destination])

    def _segment(self, operation: str) -> int | None:
        for index, name in enumerate(self.segments):
            if name.split("+", 1)[0] == operation:
                return index
        return None
