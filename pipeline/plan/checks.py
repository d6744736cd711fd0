"""Whether a calibration, a plan, a network and the devices at hand belong together; one clear sentence where not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from pipeline.errors import InputError
from pipeline.graph.trace import Graph
from pipeline.plan.layouts import Layout, master
from pipeline.plan.plan import Plan

_TORCH = re.compile(r"torch (\d+\.\d+)")


def check_calibration(calibration: xr.Dataset, graph: Graph, labels: Sequence[str]) -> None:
    """Raise ``InputError`` unless ``calibration`` is of this network, the devices called ``labels``, and this torch."""
    _check_network(calibration, graph)
    measured = [str(label) for label in calibration.device_label.values]
    if measured != list(labels):
        raise InputError(
            f"the calibration is of {', '.join(measured)}, but the devices are {', '.join(labels)}: calibrate these"
        )
    made_with, here = (
        _TORCH.search(str(calibration.attrs.get("versions", ""))),
        _TORCH.search(f"torch {torch.__version__}"),
    )
    if made_with and here and made_with[1] != here[1]:
        raise InputError(
            f"the calibration was made with torch {made_with[1]}, but this is torch {here[1]}: calibrate again"
        )
    _check_numbers(calibration)


def _check_network(calibration: xr.Dataset, graph: Graph) -> None:
    name = str(calibration.coords["network"].item()) if "network" in calibration.coords else "unnamed"
    known = {one for segment in calibration.segment.values for one in str(segment).split("+")}
    wanted = {operation.name for operation in graph.operations}
    if known != wanted:
        some = ", ".join(sorted(wanted ^ known)[:3])
        raise InputError(f"the calibration is of another network ({name}): the two differ in {some}")
    if (shape := json.loads(calibration.attrs["image_shape"])) != list(graph.input_shape):
        raise InputError(f"the calibration is for images of {shape}, but these are of {list(graph.input_shape)}")
    for operation in graph.convolutions:
        measured = int(calibration.kernels.sel(segment=operation.name).max().item())
        if measured != operation.channels:
            raise InputError(
                f"the calibration is of another network ({name}): its {operation.name} has {measured} kernels, "
                f"this one's {operation.channels}"
            )


def _check_numbers(calibration: xr.Dataset) -> None:
    for name in ("forward_time", "backward_time"):
        whole = calibration[name].min("repetition").max(["share", "images"])
        bad = whole.where(~(whole > 0), drop=True)
        if bad.size:
            segment = str(bad.segment.values[0])
            raise InputError(
                f"the calibration's {name} of {segment} is {bad.values.ravel()[0]:g} s: it must be positive"
            )
    apart = ~np.eye(calibration.sizes["source"], dtype=bool)
    for name, right, fine in (
        ("link_bandwidth", "positive", calibration.link_bandwidth.values > 0),
        ("link_latency", "at least 0", calibration.link_latency.values >= 0),
    ):
        if (wrong := np.argwhere(apart & ~fine)).size:
            source, destination = wrong[0]
            value = calibration[name].values[source, destination]
            raise InputError(
                f"the calibration's {name} from device {source} to {destination} is {value:g}: it must be {right}"
            )


def check_plan(plan: Plan, graph: Graph, labels: Sequence[str]) -> None:
    """Raise ``InputError`` unless ``plan`` is of this network and its devices are among those called ``labels``."""
    if plan.strategy != "ddp":
        found, wanted = [one.name for one in plan.operations], [one.name for one in graph.operations]
        if found != wanted:
            some = ", ".join(sorted(set(wanted) ^ set(found))[:3]) or "their order"
            raise InputError(f"the plan is for another model: the two differ in {some}")
        for operation in graph.operations:
            planned = plan[operation.name]
            taken = {graph.channels_of(value) for value in operation.inputs}
            _check_layout(planned.output, {operation.channels}, plan, operation.name)
            _check_layout(planned.input, taken, plan, operation.name)
    for device, label in zip(plan.devices, plan.labels, strict=True):
        if device >= len(labels):
            raise InputError(f"the plan needs device {device} ({label}), but there are only {len(labels)}: plan again")
        if labels[device] != label:
            raise InputError(f"device {device} is {label} in the plan, but {labels[device]} here: plan again")


def _check_layout(layout: Layout, channels: set[int], plan: Plan, name: str) -> None:
    """Whether a layout can be one of a tensor with one of so many ``channels``, for the operation called ``name``."""
    total = sum(layout.shares)
    if layout.kind == "K" and total not in channels:
        raise InputError(
            f"the plan is for another model: it splits {total} channels of {name}, which has {min(channels, default=0)}"
        )
    if layout.kind == "B" and total != plan.batch_size:
        raise InputError(f"the plan splits {total} images for {name}, but its batch size is {plan.batch_size}")
    if layout.kind == "M" and layout != master(plan.ranks):
        raise InputError(
            f"the plan has {name} in layout M with shares {list(layout.shares)}: M is all on the first rank"
        )
    if layout.kind in "RP" and not set(layout.shares) <= {0, 1}:
        raise InputError(f"the plan has shares {list(layout.shares)} for {name} in layout {layout.kind}: write 1 or 0")
