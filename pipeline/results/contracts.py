"""The data contracts: which variables each store holds, over which dimensions, in which units.

Every time is in seconds, every size in bytes. Text is dimensionless and says so (units "1"). NaN, or '' for text, fills
whatever does not exist: a rank that took no part in an instruction, a repetition that was not made.

**Cell**, one point of the timing grid, one zarr zip file. Scalar coordinates `network`, `batch_size`, `device_set`,
`link`, `strategy`; dimensions `device` (the rank), `repetition`, `instruction`:

    step_time, round, loss(repetition)  convolution_time(repetition: only the last of a round of `single`, else NaN)
    compute_time, exchange_time, idle_time(device, repetition)
    predicted_step_time()  chosen()  status(): "ok", "out of memory: ...", "failed: ..."
    device_label, device_throughput, share, peak_memory, stolen(device)
    instruction_name, instruction_kind, instruction_phase, instruction_bytes,
    instruction_master_bytes(instruction)
    instruction_start, instruction_end(instruction, device): timeline of the last step of a round, from its start
    predicted_start, predicted_end(instruction, device): the planner's (NaN under `ddp`)  predicted_memory(device)

**Timing grid** (`timing.zarr`; `simulation.zarr` has the same names): the cells over the dense product of `network`,
`batch_size`, `device_set`, `link`, `strategy`, and these dimensions in front of those above. `device_label` is
(device_set, device). `status` is "not planned" where no cell was asked for. Besides, `noisy(network, batch_size,
device_set, link, strategy)` flags cells whose repetitions spread much. A simulation has only `step_time`,
`predicted_step_time`, `status` and `device_label`, and the attribute `simulated`.

**Calibration** (`calibration.zarr`), per `network` (a scalar) or, of several, along `calibration`:

    forward_time, backward_time, input_gradient_time(device, segment, share, images, repetition)
    forward_time_alone, backward_time_alone(device, segment, repetition)
    forward_time_by_images, backward_time_by_images(device, segment, repetition)
    forward_call_time, backward_call_time(device, repetition)
    forward_resuming_time, backward_resuming_time(device, repetition)
    kernels(segment, share)  work(segment)  device_label, process_memory, memory_limit(device)
    update_overhead, update_time, update_time_alone(device, repetition)  calibration_time()
    link_time(source, destination, message_bytes, repetition)  link_latency, link_bandwidth(source, destination)
    turn_time(turn_bytes, repetition)  probe_step_time(probe, repetition)
    probe_busy_time(probe, device, repetition)  stretch(device, layout)  turn_growth(company)
    summing_time()  reducing_time()  beginning_time()

A slow device is measured at large shares with few images only; alone and by images as its whole segments are.

**Accuracy** (`accuracy.zarr`): accuracy(seed, strategy, epoch), loss(seed, strategy, step), and of a control, `single`
from initial weights that are one rounding away, control_accuracy(seed, epoch) and control_loss(seed, step); `network`,
`device_set`, `data` and `test_images` among the attributes.

**Miscalibration** (`miscalibration.zarr`): cells that were planned with a wrong calibration and ran as they are, over
`network`, `batch_size`, `device_set`, `link`, `strategy` and `error`, the relative error of the judged time of one
device, which the attribute `misjudged_device` names by its rank:

    step_time(error, repetition)  predicted_step_time(error): of the same plan, under the right calibration
    status(error)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from pipeline.errors import InputError

OK = "ok"
NOT_PLANNED = "not planned"
OUT_OF_MEMORY = "out of memory"
FAILED = "failed"


class CellIndex(NamedTuple):
    """Where a cell lies in the grid."""

    network: str
    batch_size: int
    device_set: str
    link: str
    strategy: str

    def __str__(self) -> str:
        return f"{self.network}, batch {self.batch_size}, {self.device_set}, {self.link}, {self.strategy}"


INDEX = CellIndex._fields


class Variable(NamedTuple):
    """What one variable is; `dims` are those it has in a single cell, calibration or accuracy data set."""

    dims: tuple[str, ...]
    units: str
    long_name: str
    text: bool = False
    measured: bool = False
    """Whether only a measurement has it: a simulated grid may do without."""


CELL: Mapping[str, Variable] = {
    "step_time": Variable(("repetition",), "s", "time of one training step"),
    "round": Variable(("repetition",), "1", "round of all strategies that the step was timed in", measured=True),
    "compute_time": Variable(("device", "repetition"), "s", "time a device computes within one step", measured=True),
    "exchange_time": Variable(
        ("device", "repetition"), "s", "time a device sends and receives within one step", measured=True
    ),
    "idle_time": Variable(("device", "repetition"), "s", "time a device waits within one step", measured=True),
    "predicted_step_time": Variable((), "s", "time of one training step predicted by the planner"),
    "status": Variable((), "1", "how the cell ended", text=True),
    "chosen": Variable(
        (), "1", "strategy whose plan ran: what auto chose, itself where it mixed several", text=True, measured=True
    ),
    "device_label": Variable(("device",), "1", "device of a rank", text=True),
    "device_throughput": Variable(
        ("device",), "images/s", "calibrated training throughput of a device on its own", measured=True
    ),
    "share": Variable(("device",), "1", "fraction of the split convolution work of a device", measured=True),
    "peak_memory": Variable(("device",), "bytes", "peak memory of a rank", measured=True),
    "stolen": Variable(
        ("device",), "1", "fraction of its cores' time that the host gave to other machines", measured=True
    ),
    "convolution_time": Variable(("repetition",), "s", "time in convolutions within one step", measured=True),
    "loss": Variable(("repetition",), "1", "training loss of the step", measured=True),
    "instruction_name": Variable(("instruction",), "1", "name of an instruction", text=True, measured=True),
    "instruction_kind": Variable(("instruction",), "1", "compute, exchange or update", text=True, measured=True),
    "instruction_phase": Variable(("instruction",), "1", "forward, backward or update", text=True, measured=True),
    "instruction_bytes": Variable(("instruction",), "bytes", "bytes moved between ranks", measured=True),
    "instruction_master_bytes": Variable(
        ("instruction",), "bytes", "bytes that the master sends and receives", measured=True
    ),
    "instruction_start": Variable(("instruction", "device"), "s", "start since the step's start", measured=True),
    "instruction_end": Variable(("instruction", "device"), "s", "end since the step's start", measured=True),
    "predicted_start": Variable(("instruction", "device"), "s", "predicted start since the step's", measured=True),
    "predicted_end": Variable(("instruction", "device"), "s", "predicted end since the step's start", measured=True),
    "predicted_memory": Variable(
        ("device",), "bytes", "predicted peak memory of a rank with its process and images", measured=True
    ),
}

NOISY = 0.1
"""A cell whose interquartile range exceeds this fraction of its median is flagged."""

GRID: Mapping[str, Variable] = {
    "noisy": Variable((), "1", f"whether IQR / median of the step time exceeds {NOISY}", measured=True),
}

_SEGMENT_TIME = ("device", "segment", "share", "images", "repetition")
CALIBRATION: Mapping[str, Variable] = {
    "forward_time": Variable(_SEGMENT_TIME, "s", "forward time of a segment"),
    "backward_time": Variable(_SEGMENT_TIME, "s", "backward time of a segment"),
    "kernels": Variable(("segment", "share"), "1", "kernels of a segment at a share"),
    "work": Variable(("segment",), "1", "geometry of a segment: equal where the work is", text=True),
    "input_gradient_time": Variable(
        _SEGMENT_TIME, "s", "backward time until a divided segment's input has its gradient"
    ),
    "forward_time_alone": Variable(
        ("device", "segment", "repetition"), "s", "forward time of a whole segment while all other devices wait"
    ),
    "backward_time_alone": Variable(
        ("device", "segment", "repetition"), "s", "backward time of a whole segment while all other devices wait"
    ),
    "forward_time_by_images": Variable(
        ("device", "segment", "repetition"),
        "s",
        "forward time of a whole segment with batch normalisation over images of several devices",
    ),
    "backward_time_by_images": Variable(
        ("device", "segment", "repetition"),
        "s",
        "backward time of a whole segment with batch normalisation over images of several devices",
    ),
    "forward_call_time": Variable(("device", "repetition"), "s", "forward time of a computation of nothing"),
    "backward_call_time": Variable(("device", "repetition"), "s", "backward time of a computation of nothing"),
    "forward_resuming_time": Variable(
        ("device", "repetition"), "s", "what a forward computation takes longer after an exchange"
    ),
    "backward_resuming_time": Variable(
        ("device", "repetition"), "s", "what a backward computation takes longer after an exchange"
    ),
    "update_overhead": Variable(("device", "repetition"), "s", "time of the optimiser whatever its parameters"),
    "update_time": Variable(("device", "repetition"), "s", "time of the optimiser per parameter"),
    "update_time_alone": Variable(
        ("device", "repetition"), "s", "time of the optimiser per parameter, while the other devices wait"
    ),
    "calibration_time": Variable((), "s", "time that the whole calibration took"),
    "device_label": Variable(("device",), "1", "device of a rank", text=True),
    "process_memory": Variable(("device",), "bytes", "memory of a rank's process without any network"),
    "memory_limit": Variable(("device",), "bytes", "most memory that a rank may hold"),
    "link_time": Variable(("source", "destination", "message_bytes", "repetition"), "s", "time of one message"),
    "turn_time": Variable(
        ("turn_bytes", "repetition"), "s", "time of an exchange between all ranks, which hardly compute before it"
    ),
    "probe_step_time": Variable(("probe", "repetition"), "s", "time of a real step"),
    "probe_busy_time": Variable(
        ("probe", "device", "repetition"), "s", "time that a device computes its share in a real step"
    ),
    "beginning_time": Variable((), "s", "time of a step before its first computation and after its last"),
    "stretch": Variable(
        ("device", "layout"), "1", "time of a computation in a real step over its time as measured by itself"
    ),
    "turn_growth": Variable(
        ("company",), "1", "how much longer an exchange takes for each second of computing before it"
    ),
    "summing_time": Variable((), "s/byte", "what summing gradients costs a device"),
    "reducing_time": Variable((), "s/byte", "what summing gradients takes ddp besides; of batch if not tried"),
    "link_latency": Variable(("source", "destination"), "s", "latency of a link"),
    "link_bandwidth": Variable(("source", "destination"), "bytes/s", "bandwidth of a link"),
}

ACCURACY: Mapping[str, Variable] = {
    "accuracy": Variable(("seed", "strategy", "epoch"), "1", "fraction of the test images classified correctly"),
    "loss": Variable(("seed", "strategy", "step"), "1", "training loss of the step"),
    "control_accuracy": Variable(("seed", "epoch"), "1", "accuracy of single from weights one rounding away"),
    "control_loss": Variable(("seed", "step"), "1", "training loss of single from weights one rounding away"),
}

MISCALIBRATION: Mapping[str, Variable] = {
    "step_time": CELL["step_time"],
    "predicted_step_time": CELL["predicted_step_time"],
    "status": CELL["status"],
}

COORDINATES: Mapping[str, tuple[str, str]] = {
    "network": ("1", "network: kernels of two convolutions, torchvision name or factory"),
    "batch_size": ("1", "images per step over all devices"),
    "device_set": ("1", "devices that train together"),
    "link": ("1", "link between the devices"),
    "strategy": ("1", "how the network is split"),
    "repetition": ("1", "repetition of the measurement"),
    "device": ("1", "rank of a device in its set"),
    "instruction": ("1", "position of an instruction in the program"),
    "segment": ("1", "operations between two exchanges"),
    "share": ("1", "fraction of a segment's kernels"),
    "images": ("1", "images that a segment was measured with"),
    "source": ("1", "rank that sends"),
    "destination": ("1", "rank that receives"),
    "message_bytes": ("bytes", "size of a message"),
    "turn_bytes": ("bytes", "size of a message from each rank to every other"),
    "calibration": ("1", "one network calibrated on one device set"),
    "error": ("1", "relative error of the judged time of a device"),
    "seed": ("1", "seed of the initial weights and of the order of the images"),
    "epoch": ("1", "passes over the training data"),
    "step": ("1", "training steps taken"),
}


def grid_dims(name: str) -> tuple[str, ...]:
    """Dimensions of a cell's variable in the combined grid."""
    if name == "device_label":
        return ("device_set", "device")
    return (*INDEX, *(CELL[name] if name in CELL else GRID[name]).dims)


def describe(dataset: xr.Dataset) -> xr.Dataset:
    """A shallow copy whose known variables and coordinates carry `units` and `long_name`, set anew."""
    described = dataset.copy(deep=False)
    for name in map(str, described.variables):
        contracts = () if name in described.coords else (CELL, GRID, CALIBRATION, ACCURACY)
        known = next((contract[name] for contract in contracts if name in contract), None)
        units, long_name = (known.units, known.long_name) if known else COORDINATES.get(name, (None, None))
        if units is not None:
            described[name].attrs.update(units=units, long_name=long_name)
    return described


def cell_index(cell: xr.Dataset, source: str = "the data set") -> CellIndex:
    """Where the cell lies in the grid; raises InputError when a coordinate is missing."""
    for name in INDEX:
        if name not in cell.coords or cell[name].ndim:
            raise InputError(f"{source} is not a cell: it has no scalar coordinate {name}.")
    text = {name: str(cell[name].item()) for name in INDEX}
    return CellIndex(
        text["network"], int(cell["batch_size"].item()), text["device_set"], text["link"], text["strategy"]
    )


def unmeasured_cell(index: CellIndex, device_labels: Sequence[str], status: str) -> xr.Dataset:
    """The cell of a run that gave no times: every number NaN, no repetition, no instruction, and `status` says why."""
    sizes = {"device": len(device_labels), "repetition": 0, "instruction": 0}
    cell = xr.Dataset(coords={**index._asdict(), **{dim: np.arange(size) for dim, size in sizes.items()}})
    for name, variable in CELL.items():
        shape = tuple(sizes[dim] for dim in variable.dims)
        cell[name] = (variable.dims, np.full(shape, "", object) if variable.text else np.full(shape, np.nan))
    cell["status"] = status
    cell["device_label"] = ("device", np.array(device_labels, object))
    return describe(cell)


def validate_cell(dataset: xr.Dataset, source: str = "the data set") -> None:
    """Raise InputError, in one sentence that names `source`, unless the data set is a cell."""
    cell_index(dataset, source)
    _validate(dataset, {name: variable.dims for name, variable in CELL.items()}, CELL, f"{source} is not a cell")


def validate_timing(dataset: xr.Dataset, source: str = "the data set") -> None:
    """Raise InputError, in one sentence that names `source`, unless the data set is a (measured or simulated) grid."""
    contract = {**CELL, **GRID}
    needed = {n: grid_dims(n) for n, variable in contract.items() if n in dataset or not variable.measured}
    _validate(dataset, needed, contract, f"{source} is not a timing grid", coordinates=INDEX)


def validate_calibration(dataset: xr.Dataset, source: str = "the data set") -> None:
    """Raise InputError, in one sentence that names `source`, unless the data set is a calibration."""
    several = ("calibration",) if "calibration" in dataset.dims else ()
    needed = {name: (*several, *variable.dims) for name, variable in CALIBRATION.items()}
    _validate(
        dataset, needed, CALIBRATION, f"{source} is not a calibration", coordinates=("network", "segment", "images")
    )


def validate_accuracy(dataset: xr.Dataset, source: str = "the data set") -> None:
    """Raise InputError, in one sentence that names `source`, unless the data set holds accuracies."""
    what = f"{source} holds no accuracies"
    dims = {name: variable.dims for name, variable in ACCURACY.items()}
    _validate(dataset, dims, ACCURACY, what, coordinates=("seed", "strategy", "epoch"))
    for name in ("network", "device_set", "data", "test_images"):
        if name not in dataset.attrs:
            raise InputError(f"{what}: attribute {name} is missing.")


def validate_miscalibration(dataset: xr.Dataset, source: str = "the data set") -> None:
    """Raise InputError, in one sentence that names `source`, unless the data set is of wrong calibrations."""
    what = f"{source} is not of wrong calibrations"
    needed = {name: (*INDEX, "error", *variable.dims) for name, variable in MISCALIBRATION.items()}
    _validate(dataset, needed, MISCALIBRATION, what, coordinates=(*INDEX, "error"))
    if "misjudged_device" not in dataset.attrs:
        raise InputError(f"{what}: attribute misjudged_device is missing.")


def _validate(
    dataset: xr.Dataset,
    dims: Mapping[str, tuple[str, ...]],
    contract: Mapping[str, Variable],
    what: str,
    coordinates: Sequence[str] = (),
) -> None:
    for name in coordinates:
        if name not in dataset.coords:
            raise InputError(f"{what}: coordinate {name} is missing (it has {_listed(dataset.coords)}).")
    for name, expected in dims.items():
        if name not in dataset.data_vars:
            raise InputError(f"{what}: variable {name} is missing (it has {_listed(dataset.data_vars)}).")
        found = tuple(str(dim) for dim in dataset[name].dims)
        if set(found) != set(expected):
            raise InputError(f"{what}: variable {name} has dimensions {_listed(found)} instead of {_listed(expected)}.")
        is_text = dataset[name].dtype.kind in "OTU"
        if is_text != contract[name].text:
            wanted = "text" if contract[name].text else "numbers"
            raise InputError(f"{what}: variable {name} is of type {dataset[name].dtype} where {wanted} belong.")


def _listed(names: object) -> str:
    return ", ".join(str(name) for name in names) or "none"  # type: ignore[attr-defined]
