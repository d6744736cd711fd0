"""Plans as JSON: written by one command, read by another, and legible to a person."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import InputError
from pipeline.plan.layouts import Kind, Layout
from pipeline.plan.plan import OperationPlan, Plan, Strategy


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Layout(_Section):
    kind: Kind
    shares: tuple[int, ...]


class _Operation(_Section):
    name: str
    input: _Layout
    output: _Layout
    home: Literal["master", "shard"]


class _Plan(_Section):
    strategy: Strategy
    batch_size: int
    devices: tuple[int, ...]
    labels: tuple[str, ...]
    channels_last: bool = False
    network_digest: str = ""
    operations: tuple[_Operation, ...]


_FIELDS = ("strategy", "batch_size", "devices", "labels", "channels_last", "network_digest")


def plan_to_json(plan: Plan) -> str:
    """The plan as JSON text; the network is not in it, only its digest and the names of its operations."""
    operations = tuple(
        _Operation(name=one.name, input=_written(one.input), output=_written(one.output), home=one.home)
        for one in plan.operations
    )
    fields = {name: getattr(plan, name) for name in _FIELDS}
    return _Plan(**fields, operations=operations).model_dump_json(indent=1) + "\n"


def plan_from_json(text: str, source: str = "the plan") -> Plan:
    """Read what ``plan_to_json`` wrote.

    Raises ``InputError``, in one sentence that names ``source``, for anything that is not a plan.
    """
    try:
        read = _Plan.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its text"
        raise InputError(f"{source} is not a plan: {where}: {first['msg'].lower()}") from None
    ranks = len(read.devices)
    if not ranks or len(set(read.devices)) != ranks or len(read.labels) != ranks or min(read.devices) < 0:
        raise InputError(
            f"{source} is not a plan: devices {list(read.devices)} and labels {list(read.labels)} must be one each"
        )
    if read.batch_size < 1:
        raise InputError(f"{source} is not a plan: batch_size {read.batch_size} must be at least 1")
    for one in read.operations:
        for layout in (one.input, one.output):
            if len(layout.shares) != ranks:
                raise InputError(
                    f"{source} is not a plan: {one.name} has shares for {len(layout.shares)} of {ranks} devices"
                )
    return Plan(
        strategy=read.strategy,
        batch_size=read.batch_size,
        devices=read.devices,
        labels=read.labels,
        channels_last=read.channels_last,
        network_digest=read.network_digest,
        operations=tuple(
            OperationPlan(
                name=one.name,
                input=_read(one.input, one.name, source),
                output=_read(one.output, one.name, source),
                home=one.home,
            )
            for one in read.operations
        ),
    )


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan to a file, for ``read_plan`` and ``train --plan``; raises ``InputError`` where that cannot be."""
    try:
        Path(path).write_text(plan_to_json(plan), encoding="utf-8")
    except OSError as error:
        raise InputError(f"the plan cannot be written to {path}: {error.strerror}") from None


def read_plan(path: str | Path) -> Plan:
    """The plan in a file; raises ``InputError`` where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"the plan {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a plan: it is no text") from None
    return plan_from_json(text, str(path))


def _written(layout: Layout) -> _Layout:
    return _Layout(kind=layout.kind, shares=layout.shares)


def _read(layout: _Layout, name: str, source: str) -> Layout:
    try:
        return Layout(layout.kind, layout.shares)
    except InputError as error:
        raise InputError(f"{source} is not a plan: {name}: {error}") from None
