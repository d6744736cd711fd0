"""Whether a calibration, a plan, a network and the devices at hand belong together; one clear sentence where not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

import torch
import xarray as xr

from pipeline.errors import InputError
from pipeline.graph.effects import Effect
from pipeline.graph.operations import Graph, Operation
from pipeline.plan.layouts import Layout, kernels, master
from pipeline.plan.measurements import check_numbers
from pipeline.plan.plan import OperationPlan, ParameterPlan, Plan, parameter_plans
from pipeline.plan.ties import on_master
from pipeline.results.contracts import validate_calibration

_TORCH = re.compile(r"\btorch (\d+\.\d+)")

_GOES: Mapping[Effect, tuple[str, ...]] = {
    Effect.KERNEL: ("MM", "RR", "BB", "RK", "KP", "MK", "KM"),  # R and P are M where the first rank alone has a part
    **dict.fromkeys((Effect.GROUPED, Effect.CHANNELWISE, Effect.BATCHNORM, Effect.FLATTEN), ("MM", "RR", "BB", "KK")),
    Effect.IMAGEWISE: ("MM", "RR", "BB"),
    Effect.WHOLE: ("MM",),
}
"""By effect, the kinds of layouts, of what it takes and of what it gives, in which the ranks can do an operation."""


def check_calibration(calibration: xr.Dataset, graph: Graph, labels: Sequence[str]) -> None:
    """Raise ``InputError`` unless ``calibration`` is of this network, the devices called ``labels``, and this torch.

    Of torch the first two numbers count: another third one mends errors, and another build, with CUDA or without, is
    what a driver beside machines with GPUs has.
    """
    image_shape = image_shape_of(calibration)
    _check_versions(calibration)
    _check_network(calibration, graph, image_shape)
    measured = [str(label) for label in calibration.device_label.values]
    if measured != list(labels):
        raise InputError(
            f"the calibration is of {', '.join(measured)}, but the devices are {', '.join(labels)}: calibrate these"
        )
    check_numbers(calibration, graph)


def check_single(calibration: xr.Dataset, source: str = "the data set") -> None:
    """Raise ``InputError``, which names ``source``, unless ``calibration`` is one, of one network on one device set."""
    if "calibration" in calibration.dims:
        networks, sets = (
            [str(one) for one in calibration[name].values] if name in calibration.coords else []
            for name in ("network", "device_set")
        )
        named = [" on ".join(one) for one in zip(networks, sets, strict=True)] if sets else networks
        raise InputError(
            f"{source} combines {calibration.sizes['calibration']} calibrations ({', '.join(named)}): take the file "
            "that `calibrate` wrote for one of them, in a study outputs/calibration/NETWORK/DEVICES.zarr.zip"
        )
    validate_calibration(calibration, source)


def image_shape_of(calibration: xr.Dataset) -> tuple[int, ...]:
    """The shape ``(C, H, W)`` of the images that a calibration is for; raises ``InputError`` as ``check_single`` does.

    Also where it does not say.
    """
    check_single(calibration)
    said = calibration.attrs.get("image_shape")
    try:
        return tuple(int(size) for size in json.loads(str(said)))
    except (ValueError, TypeError):
        raise InputError(
            f"the calibration does not say what images it is for: its attribute image_shape is {said}, where "
            "[3, 32, 32] or the like belongs, so calibrate again"
        ) from None


def _check_versions(calibration: xr.Dataset) -> None:
    made_with = _TORCH.search(str(calibration.attrs.get("versions", "")))
    here = _TORCH.search(f"torch {torch.__version__}")
    if made_with is None:
        raise InputError(
            "the calibration does not say which torch it was made with: its attribute versions is "
            f"{calibration.attrs.get('versions')}, where 'torch {torch.__version__}' or the like belongs, so calibrate "
            "again"
        )
    if here is not None and made_with[1] != here[1]:
        raise InputError(
            f"the calibration was made with torch {made_with[1]}, but this is torch {here[1]}: calibrate again"
        )


def _check_network(calibration: xr.Dataset, graph: Graph, image_shape: tuple[int, ...]) -> None:
    name = str(calibration.coords["network"].item())
    known = {one for segment in calibration.segment.values for one in str(segment).split("+")}
    wanted = {operation.name for operation in graph.operations}
    if known != wanted:
        some = ", ".join(sorted(wanted ^ known)[:3])
        raise InputError(f"the calibration is of another network ({name}): the two differ in {some}")
    if image_shape != graph.input_shape:
        raise InputError(
            f"the calibration is for images of {list(image_shape)}, but these are of {list(graph.input_shape)}"
        )
    for operation in graph.convolutions:
        if operation.name not in calibration.segment.values:
            continue  # measured together with what it is bound to
        measured = int(calibration.kernels.sel(segment=operation.name).max().item())
        if measured != operation.channels:
            raise InputError(
                f"the calibration is of another network ({name}): its {operation.name} has {measured} kernels, "
                f"this one's {operation.channels}"
            )
    # Those of before there was a digest are taken for what their names, images and kernels say.
    if (digest := calibration.attrs.get("network_digest", graph.digest)) != graph.digest:
        raise InputError(
            f"the calibration is of another network ({name}, digest {digest}): the operations of this one (digest "
            f"{graph.digest}) have the same names, but some size, stride or the like differs, or which weights are "
            "trained, so calibrate this one"
        )


def check_plan(plan: Plan, graph: Graph, labels: Sequence[str]) -> None:
    """Raise ``InputError`` unless ``plan`` can be run: by this network, on devices among those called ``labels``."""
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
    # One of before there was a digest is taken for what its names and shares say.
    if plan.network_digest not in ("", graph.plan_digest):
        raise InputError(
            f"the plan is for another model (digest {plan.network_digest}): some operation, size, stride or the like "
            f"of this one (digest {graph.plan_digest}) differs, so plan again"
        )
    if plan.strategy != "ddp":
        _check_operations(plan, graph)
    for device, label in zip(plan.devices, plan.labels, strict=True):
        if device >= len(labels):
            raise InputError(f"the plan needs device {device} ({label}), but there are only {len(labels)}: plan again")
        if labels[device] != label:
            raise InputError(f"device {device} is {label} in the plan, but {labels[device]} here: plan again")


def _check_layout(layout: Layout, channels: set[int], plan: Plan, name: str) -> None:
    """Whether a layout can be one of a tensor with one of so many ``channels``, for the operation called ``name``."""
    total = sum(layout.shares)
    if len(layout.shares) != plan.ranks:
        raise InputError(f"the plan has {len(layout.shares)} shares for {name}, but {plan.ranks} devices: plan again")
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


def _check_operations(plan: Plan, graph: Graph) -> None:
    """Whether each operation can be done in its layouts, and has in them what it takes and what it shares."""
    whole = on_master(graph)
    first: dict[str, tuple[str, ParameterPlan]] = {}
    for operation in graph.operations:
        planned = plan[operation.name]
        _check_operation(operation, planned, graph, whole=operation.name in whole)
        for value in operation.inputs:
            if graph.shape_of(value) is None and plan[value].output != planned.input:
                raise InputError(
                    f"the plan has {operation.name} take {planned.input}, but {value}, which it takes and which cannot "
                    f"travel, is in {plan[value].output}: the two must be the same"
                )
        for one in parameter_plans(operation, planned):
            other, known = first.setdefault(one.parameter.name, (operation.name, one))
            if (known.channel_axis, known.home, known.work) != (one.channel_axis, one.home, one.work):
                raise InputError(
                    f"the plan has {one.parameter.name} in {known.work} for {other}, but in {one.work} for "
                    f"{operation.name}: who shares a weight must have the same parts of it"
                )


def _check_operation(operation: Operation, planned: OperationPlan, graph: Graph, *, whole: bool) -> None:
    source, target = planned.input, planned.output
    effect = Effect.WHOLE if whole else operation.effect
    there = f"the plan has {operation.name} go from {source} to {target}"
    if source.kind + target.kind not in _GOES[effect]:
        possible = ", ".join(" to ".join(kinds) for kinds in _GOES[effect])
        raise InputError(f"{there}: an operation of its kind ({effect.value}) can go from {possible}")
    if source.holders != target.holders:
        raise InputError(f"{there}: the ranks that have something of the one must be those of the other")
    if source.kind != target.kind:  # other channels come out of a layer than go in
        return
    if target.kind == "K" and any(share % operation.unit for share in target.shares):
        raise InputError(f"{there}: each share must be a multiple of {operation.unit}, as these channels stay together")
    if target != (made := _made_of(source, operation, graph)):
        raise InputError(f"{there}: of {source} it makes {made}")


def _made_of(source: Layout, operation: Operation, graph: Graph) -> Layout:
    """The layout of what an operation that keeps the split makes of ``source``."""
    if operation.effect is Effect.FLATTEN:
        return source.scaled(operation.channels // graph.channels_of(operation.inputs[0]))
    if operation.effect is Effect.GROUPED and source.kind == "K":
        return kernels(tuple(share * operation.unit // operation.input_unit for share in source.shares))
    return source
