"""What a calibration says about the time of any operation, exchange or update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.plan.instructions import COMPANIES, Direction

if TYPE_CHECKING:  # ranks that measure their memory do without
    import xarray as xr

Curves = tuple[NDArray[np.float64], NDArray[np.float64]]

_ALIKE = 1.05
"""Devices of one label whose times lie within this factor are taken to be equal: two cores of one processor differ by
less, but measurements of them by some per cent, which would make one of them wait for the other in every step."""

CROWD = 3
"""With so many ranks several links are in use at once."""
Shared = Literal["K", "B", "M", "ddp"]
LAYOUTS: tuple[Shared, ...] = ("K", "B", "M", "ddp")
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
"""As they follow each other in arrays with that axis."""
_SECONDS = ("fixed", "per_image", "whole", "beginning", "call", "resuming", "update", "update_overhead")
_OF_A_DEVICE = (*_SECONDS, "alone", "update_alone", "stretch", "turn", "turn_growth", "summing", "reducing", "crowding")
"""Arrays of which the first axis is the device's."""
_HALF = 0.5
"""The gradients of a convolution's input and of its weights take the same number of operations."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Cost curves of one calibration, for chosen devices.

    The time of a *fraction* of a segment (of its kernels, or of a dense layer's input features) is a line over the
    images, ``fixed + images * per_image``: each of the two never falls over the fraction, and is interpolated between
    the measured ones. The lower median of the repetitions counts. Devices of one label that hardly differ share the
    mean of their curves.
    """

    segments: tuple[str, ...]
    """Names of the calibrated segments: their operations joined by ``+``."""
    fractions: NDArray[np.float64]
    """(segment, share), ascending; NaN where a segment was measured at fewer shares."""
    fixed: NDArray[np.float64]
    """(device, segment, share, direction) in s, whatever the number of images; direction 0 is forward, 1 backward."""
    per_image: NDArray[np.float64]
    """(device, segment, share, direction) in s per image."""
    whole: NDArray[np.float64]
    """(device, segment, 2, direction) what is fixed and what is per image where nothing is divided: of somebody who has
    all kernels, for all images or some. May be less than a large part, whose backward computation is divided."""
    beginning: NDArray[np.float64]
    """(device) in s that a step takes before its first computation, and after its last."""
    call: NDArray[np.float64]
    """(device, direction) in s that every computation takes beside what its segments do."""
    resuming: NDArray[np.float64]
    """(device, direction) in s that a computation takes besides after an exchange."""
    latency: NDArray[np.float64]
    """(source, destination) in s; (1, 1) where all pairs are alike."""
    seconds_per_byte: NDArray[np.float64]
    """(source, destination) in s per byte."""
    update: NDArray[np.float64]
    """(device) in s per trained parameter."""
    update_overhead: NDArray[np.float64]
    """(device) in s, whatever the parameters."""
    input_part: NDArray[np.float64]
    """(segment) of the backward time of a divided segment, the fraction until its input has its gradient."""
    by_images: NDArray[np.float64]
    """(segment, direction) how many times as long a segment takes with batch normalisation over a part of the images:
    in two goes, between which the devices exchange their moments."""
    alone: NDArray[np.float64]
    """(device, segment, direction) what part of these times a segment takes while the other devices wait: devices that
    share a processor take memory bandwidth, cache and clock from each other."""
    update_alone: NDArray[np.float64]
    """(device) what part of its time the update of a parameter takes while the other devices wait."""
    stretch: NDArray[np.float64]
    """(device, layout) how many times as long computations take in a real step in which the devices share the kernels,
    or the images, or one does it all, or under ``ddp`` (``LAYOUTS``)."""
    turn: NDArray[np.float64]
    """(device) in s, from its having computed until others that wait for that go on, beside what is sent to them."""
    turn_growth: NDArray[np.float64]
    """(device, company) how much longer that is for each second of the computing, by who takes part (``COMPANIES``):
    devices that share cores wait for them."""
    summing: NDArray[np.float64]
    """(device) in s per byte of gradients that are sent or received to be summed; 0 where nothing is known of that."""
    reducing: NDArray[np.float64]
    """(device) in s per byte of gradients that ``ddp`` sums, beside its messages."""
    crowding: NDArray[np.float64]
    """(device) how many times as long a byte takes when all devices send at once."""
    memory: NDArray[np.float64] | None = None
    """(device) bytes that each may hold beyond its process; None where nothing is known of that."""
    channels_last: bool = False
    """Whether it all was measured with the channels last in memory, which was faster then."""
    _places: dict[str, int] = field(init=False, repr=False, compare=False)
    _segments: dict[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        operations = [tuple(name.split("+")) for name in self.segments]
        object.__setattr__(self, "_places", {one[0]: index for index, one in enumerate(operations)})
        object.__setattr__(self, "_segments", {name: one for one in operations for name in one})

    @classmethod
    def of(cls, calibration: xr.Dataset) -> Costs:
        """The costs of all devices of one network's calibration."""
        parts = [_typical(calibration[name]) for name in ("forward_time", "backward_time", "input_gradient_time")]
        measured_times, until_input = np.stack(parts[:2], axis=-1), parts[2]
        times, beside = _completed(measured_times, calibration.images.values), _whole_as_measured(measured_times)
        update = _both(calibration, "update_overhead", "update_time")
        call = _both(calibration, "forward_call_time", "backward_call_time")
        resuming = _both(calibration, "forward_resuming_time", "backward_resuming_time")
        stretch = calibration.stretch.sel(layout=list(LAYOUTS)).transpose("device", "layout").values.copy()
        kinds = [str(label).partition("[")[0] for label in calibration.device_label.values]  # whatever the memory
        for alike in _alike(kinds, times):
            for measured in (times, update, call, resuming, stretch):
                measured[alike] = measured[alike].mean(axis=0)
        fixed, per_image = _lines(times, calibration.images.values)
        kernels = calibration.kernels.transpose("segment", "share")
        return cls(
            segments=tuple(str(name) for name in calibration.segment.values),
            fractions=(kernels / kernels.max("share")).values,
            fixed=_rising(fixed),
            per_image=_rising(per_image),
            whole=np.stack([fixed[:, :, -1], per_image[:, :, -1]], axis=2),
            latency=calibration.link_latency.values,
            seconds_per_byte=1 / calibration.link_bandwidth.values,
            beginning=np.full(len(kinds), float(calibration.beginning_time)),
            call=call,
            resuming=resuming,
            update=update[:, 1],
            update_overhead=update[:, 0],
            input_part=_input_part(until_input, parts[1]),
            by_images=_by_images(calibration, beside),
            alone=_part_alone(kinds, _both(calibration, "forward_time_alone", "backward_time_alone"), beside),
            update_alone=_update_alone(calibration, kinds, update[:, 1]),
            stretch=stretch,
            turn=np.full(len(kinds), _turn(calibration)),
            turn_growth=np.tile(calibration.turn_growth.sel(company=list(COMPANIES)).values, (len(kinds), 1)),
            summing=np.full(len(kinds), float(calibration.summing_time)),
            reducing=np.full(len(kinds), float(calibration.reducing_time)),
            crowding=np.full(len(kinds), _crowding(calibration)),
            memory=np.maximum(calibration.memory_limit.values - calibration.process_memory.values, 0.0),
            channels_last=bool(calibration.attrs.get("channels_last", 0)),
        )

    def only(self, devices: Sequence[int]) -> Costs:
        """The costs of ``devices`` alone, in that order."""
        chosen = list(devices)
        of_devices: dict[str, Any] = {name: getattr(self, name)[chosen] for name in _OF_A_DEVICE}
        pairs = np.ix_(chosen, chosen) if self.latency.shape != (1, 1) else ...
        return replace(
            self,
            **of_devices,
            latency=self.latency[pairs],
            seconds_per_byte=self.seconds_per_byte[pairs],
            memory=None if self.memory is None else self.memory[chosen],
        )

    @classmethod
    def joined(cls, parts: Sequence[Costs]) -> Costs:
        """The devices of several costs of one network together; their links are not known, and count for nothing.

        Raises ``InputError`` if they were measured at different shares.
        """
        if any(not np.array_equal(one.fractions, parts[0].fractions, equal_nan=True) for one in parts):
            raise InputError("calibrations that were measured at different shares cannot be joined: calibrate alike")
        together: dict[str, Any] = {
            name: np.concatenate([getattr(one, name) for one in parts]) for name in _OF_A_DEVICE
        }
        return replace(
            parts[0],
            **together,
            memory=np.concatenate([one.memory_left for one in parts]),
            latency=np.zeros((1, 1)),
            seconds_per_byte=np.zeros((1, 1)),
        )

    def slowed(self, factor: float | NDArray[np.float64]) -> Costs:
        """The same devices if all took ``factor`` times as long to compute, or each its own, (device)."""
        slower: dict[str, Any] = {name: (getattr(self, name).T * factor).T for name in _SECONDS}
        return replace(self, **slower)

    def segment_with(self, operation: str) -> tuple[str, ...]:
        """The operations of the calibrated segment that ``operation`` is in; itself alone if it is in none."""
        return self._segments.get(operation, (operation,))

    def place_of(self, operation: str) -> int | None:
        """Which of the ``segments`` an operation is in; None if in none."""
        return self._places.get(self.segment_with(operation)[0])

    def input_part_of(self, operation: str) -> float:
        """The fraction of an operation's divided backward computation until its input has its gradient."""
        segment = self._places.get(operation)
        return _HALF if segment is None else float(self.input_part[segment])

    @property
    def memory_left(self) -> NDArray[np.float64]:
        """(device) bytes that each may hold beyond its process, without end where nothing is known."""
        return np.full(self.devices, np.inf) if self.memory is None else self.memory

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.fixed)

    def curves(self, operation: str, total: int, batch_size: int) -> Curves | None:
        """Forward plus backward time in s over the share of ``operation`` with ``total`` kernels, in a real step.

        Points, (point), and the times of all devices there, (device, point). None if the operation does not begin a
        calibrated segment.
        """
        segment = self._places.get(operation)
        if segment is None:
            return None
        both = (self.fixed[:, segment] + batch_size * self.per_image[:, segment]).sum(axis=-1)
        both = both * self.stretch[:, LAYOUTS.index("K"), None]
        measured = np.isfinite(self.fractions[segment]) & np.isfinite(both[0])
        return self.fractions[segment][measured] * total, both[:, measured]

    def alone_part(self, operation: str, direction: Direction) -> NDArray[np.float64]:
        """What part of its time the segment that ``operation`` begins takes while other devices wait, (device)."""
        segment = self._places.get(operation)
        return np.ones(self.devices) if segment is None else self.alone[:, segment, DIRECTIONS.index(direction)]

    def seconds(
        self,
        operations: Sequence[str],
        directions: Sequence[Direction],
        fractions: NDArray[np.float64],
        images: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Time of a fraction of each segment that one of ``operations`` begins, for so many ``images``; else 0.

        ``directions`` has one entry per operation; fractions, images and times in s are (operation, device).
        """
        place = np.array([self._places.get(one, -1) for one in operations], dtype=int)
        way = np.array([DIRECTIONS.index(one) for one in directions], dtype=int)
        found = self.whole[:, place, 0, way].T + images * self.whole[:, place, 1, way].T
        if (divided := (fractions > 0) & (fractions < 1)).any():
            found = np.where(divided, self._between(place, way, fractions, images), found)
        return np.where((place >= 0)[:, None] & (fractions > 0) & (images > 0), found, 0.0)

    def _between(
        self,
        place: NDArray[np.int_],
        way: NDArray[np.int_],
        fractions: NDArray[np.float64],
        images: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Interpolated between the measured shares, (operation, device)."""
        points, order, last = (table[place, ..., way] for table in self._measured)
        after = np.minimum(np.maximum((points[:, None] < fractions[..., None]).sum(axis=-1), 1), last[:, None])
        before = np.maximum(after - 1, 0)
        low, high = (np.take_along_axis(points, one, axis=1) for one in (before, after))
        along: NDArray[np.float64] = np.clip((fractions - low) / np.where(high > low, high - low, 1.0), 0, 1)
        devices = np.arange(self.devices)

        def times(points: NDArray[np.int_]) -> NDArray[np.float64]:
            at = devices, place[:, None], np.take_along_axis(order, points, axis=1), way[:, None]
            found: NDArray[np.float64] = self.fixed[at] + images * self.per_image[at]
            return found

        return (1 - along) * times(before) + along * times(after)

    @cached_property
    def _measured(self) -> tuple[NDArray[np.float64], NDArray[np.int_], NDArray[np.int_]]:
        """The fractions that were measured, those first; which they are, (segment, share, direction); the last's place.

        Fractions beyond those are infinite; the last is (segment, direction).
        """
        there = np.isfinite(self.fractions)[..., None] & np.isfinite(self.fixed[0])
        order = np.argsort(~there, axis=1, kind="stable")
        points = np.take_along_axis(np.where(there, self.fractions[..., None], np.inf), order, axis=1)
        return points, order, np.maximum(there.sum(axis=1) - 1, 0)

    def by_images_part(self, operation: str, direction: Direction) -> float:
        """How many times as long the segment that ``operation`` begins takes with images on several devices."""
        segment = self._places.get(operation)
        return 1.0 if segment is None else float(self.by_images[segment, DIRECTIONS.index(direction)])

    def whole_steps(self, batch_size: int) -> NDArray[np.float64]:
        """Forward and backward of the whole network on each device beside the others in s, (device)."""
        found: NDArray[np.float64] = self.whole_segments(batch_size).sum(axis=(1, 2))
        return found

    def steps_by_images(self, images: int) -> NDArray[np.float64]:
        """Forward and backward of the whole network for a part of the images in a real step in s, (device)."""
        found: NDArray[np.float64] = self.whole_steps(images) * self.stretch[:, LAYOUTS.index("B")]
        return found

    def whole_segments(self, batch_size: int | NDArray[np.int_]) -> NDArray[np.float64]:
        """Forward and backward of every whole segment on each device beside the others in s, (device, segment, 2).

        Each may have a number of images of its own, (device, 1, 1).
        """
        found: NDArray[np.float64] = self.whole[:, :, 0] + batch_size * self.whole[:, :, 1]
        return found

    def throughputs(self, batch_size: int) -> NDArray[np.float64]:
        """Images per second of the whole network on each device beside the others, (device)."""
        return batch_size / self.whole_steps(batch_size)

    def fastest(self, batch_size: int) -> int:
        """The device with the highest throughput."""
        return int(np.argmax(self.throughputs(batch_size)))


def on_grid(curves: Curves, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """The times of ``curves`` at other points, (device, point), constant beyond the ends."""
    points, times = curves
    if len(points) == 1:
        return np.broadcast_to(times, (len(times), len(grid)))
    after = np.clip(np.searchsorted(points, grid), 1, len(points) - 1)
    along = np.clip((grid - points[after - 1]) / (points[after] - points[after - 1]), 0, 1)
    found: NDArray[np.float64] = (1 - along) * times[:, after - 1] + along * times[:, after]
    return found


def _typical(repeated: xr.DataArray) -> NDArray[np.float64]:
    """The lower median of the repetitions, as what disturbs them only adds; NaN where there are none."""
    ascending = np.sort(repeated.transpose(..., "repetition").values, axis=-1)  # NaN last
    count = np.isfinite(ascending).sum(axis=-1, keepdims=True)
    low: NDArray[np.float64] = np.take_along_axis(ascending, np.maximum(count - 1, 0) // 2, axis=-1)[..., 0]
    return low


def _both(calibration: xr.Dataset, first: str, second: str) -> NDArray[np.float64]:
    """The typical values of two variables, (..., 2)."""
    return np.stack([_typical(calibration[first]), _typical(calibration[second])], axis=-1)


def _input_part(until_input: NDArray[np.float64], backward: NDArray[np.float64]) -> NDArray[np.float64]:
    """What fraction of ``backward`` is ``until_input``, both (device, segment, share, images); (segment)."""
    divided = np.isfinite(until_input) & (backward > 0)
    parts = np.where(divided, until_input, 0.0).sum(axis=(0, 2, 3))
    whole = np.where(divided, backward, 0.0).sum(axis=(0, 2, 3))
    return np.where(whole > 0, parts / np.where(whole > 0, whole, 1.0), _HALF)


def _update_alone(calibration: xr.Dataset, kinds: Sequence[str], beside: NDArray[np.float64]) -> NDArray[np.float64]:
    """As ``Costs.update_alone``, from the time ``beside`` others, (device)."""
    return _part_alone(kinds, _typical(calibration["update_time_alone"])[:, None], beside[:, None])[:, 0]


def _part_alone(kinds: Sequence[str], alone: NDArray[np.float64], beside: NDArray[np.float64]) -> NDArray[np.float64]:
    """What part of the times ``beside`` others those ``alone`` are, (device, ...), at most 1; 1 where not measured.

    One device of each kind is measured alone and stands for the others.
    """
    known = np.isfinite(alone) & (beside > 0)
    part = np.where(known, np.minimum(alone / np.where(known, beside, 1.0), 1.0), np.nan)
    measured = [bool(one.any()) for one in known]
    first = {kinds[one]: one for one in reversed(range(len(kinds))) if measured[one]}
    for index, kind in enumerate(kinds):
        if kind in first and not measured[index]:
            part[index] = part[first[kind]]
    return np.where(np.isfinite(part), part, 1.0)


def _by_images(calibration: xr.Dataset, beside: NDArray[np.float64]) -> NDArray[np.float64]:
    """As ``Costs.by_images``, from whole segments as measured, (device, segment, direction); 1 where nothing is so."""
    apart = _both(calibration, "forward_time_by_images", "backward_time_by_images")
    measured = np.isfinite(apart)
    whole = np.where(measured, beside, 0.0).sum(axis=0)
    parts = np.where(measured, apart, 0.0).sum(axis=0)
    return np.maximum(np.where(whole > 0, parts / np.where(whole > 0, whole, 1.0), 1.0), 1.0)


def _turn(calibration: xr.Dataset) -> float:
    """How much longer an exchange of next to nothing between ranks that compute takes than a message, in s."""
    apart = ~np.eye(calibration.sizes["device"], dtype=bool)
    latency = _median(calibration.link_latency.values[apart])
    return max(_median(calibration.turn_time.isel(turn_bytes=0).values) - latency, 0.0)


def _median(values: NDArray[np.float64]) -> float:
    """0 where nothing was measured, as between the ranks of a single device."""
    return float(np.nanmedian(values)) if np.isfinite(values).any() else 0.0


def _crowding(calibration: xr.Dataset) -> float:
    """How many times as long a byte takes when all ranks send to all, as between two; at least 1."""
    ranks = int(calibration.attrs.get("turn_ranks", calibration.sizes["device"]))
    medians = calibration.turn_time.transpose("turn_bytes", "repetition").median("repetition").values
    moving = calibration.link_bandwidth.values[~np.eye(calibration.sizes["device"], dtype=bool)]
    if ranks < CROWD or not moving.size or not np.isfinite(medians).all():
        return 1.0
    alone = (ranks - 1) * float(np.diff(calibration.turn_bytes.values)[0]) * float(np.median(1 / moving))
    return max(1.0, float(medians[1] - medians[0]) / alone) if alone > 0 else 1.0


def _alike(labels: Sequence[str], times: NDArray[np.float64]) -> list[list[int]]:
    """Groups of devices of one label that take the same time, as far as can be told, for all that was measured.

    ``times`` are (device, segment, share, images, direction).
    """
    totals = np.nansum(times, axis=tuple(range(1, times.ndim)))
    groups: list[list[int]] = []
    for device in sorted(range(len(labels)), key=lambda one: (labels[one], totals[one])):
        first = groups[-1][0] if groups else device
        if groups and labels[first] == labels[device] and totals[device] <= _ALIKE * totals[first]:
            groups[-1].append(device)
        else:
            groups.append([device])
    return groups


def _completed(times: NDArray[np.float64], images: NDArray[np.int_]) -> NDArray[np.float64]:
    """The ``times`` (device, segment, share, images, direction) with what a slow device did with few images only.

    With the most it takes as many times as long as at the largest share at which it did both: what takes a time
    whatever the images, such as reading the kernels, shrinks with the share as the rest does. At most it takes as many
    times as long as there are more images.
    """
    few, most = times[..., 0, :], times[..., -1, :]
    by_both = np.isfinite(most) & (few > 0)
    longer = np.minimum(np.where(by_both, most / np.where(by_both, few, 1.0), 1.0), images[-1] / images[0])
    largest = times.shape[2] - 1 - np.argmax(by_both[:, :, ::-1], axis=2)
    longest = np.take_along_axis(longer, largest[:, :, None], axis=2)
    completed = times.copy()
    completed[..., -1, :] = np.where(np.isfinite(most), most, few * longest)
    return completed


def _whole_as_measured(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of whole segments the ``times`` (device, segment, share, images, direction) with the most images measured."""
    few, most = times[:, :, -1, 0], times[:, :, -1, -1]
    found: NDArray[np.float64] = np.where(np.isfinite(most), most, few)
    return found


def _lines(times: NDArray[np.float64], images: NDArray[np.int_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Intercept and slope over ``images`` of times (..., images, direction), neither of them negative."""
    few, many = times[..., 0, :], times[..., -1, :]
    if len(images) == 1:
        return np.zeros_like(many), many / images[-1]
    slope = np.clip((many - few) / (images[-1] - images[0]), 0, many / images[-1])
    return many - slope * images[-1], slope


def _rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The closest values that never fall over the share, the third axis; NaN stays.

    Each is the largest, over where a run of shares may begin, of the smallest mean of such a run (Robertson, Wright and
    Dykstra 1988, Order Restricted Statistical Inference, chapter 1): all curves at once, for a thousand devices.
    """
    there = np.isfinite(values)
    none = np.zeros_like(values[:, :, :1])
    total = np.concatenate([none, np.cumsum(np.where(there, values, 0.0), axis=2)], axis=2)
    count = np.concatenate([none, np.cumsum(there, axis=2)], axis=2)
    shares, risen = values.shape[2], np.full_like(values, -np.inf)
    for first in range(shares):
        least = np.full_like(none[:, :, 0], np.inf)
        for last in reversed(range(first, shares)):
            among = count[:, :, last + 1] - count[:, :, first]
            mean = (total[:, :, last + 1] - total[:, :, first]) / np.maximum(among, 1)
            least = np.where(among > 0, np.minimum(least, mean), least)
            risen[:, :, last] = np.maximum(risen[:, :, last], np.where(np.isfinite(least), least, -np.inf))
    return np.where(there, risen, np.nan)
