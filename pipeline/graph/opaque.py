"""Submodules that run as they are: one operator of our own stands for each of them in an export.

The operator is told, from two real runs, what a submodule is called with and what it gives for two numbers of images;
within an export it gives empty tensors of such shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.graph.copies import Inputs, copied, gradients_kept
from pipeline.graph.nodes import Value, mapped

_TRIALS = (2, 3)


@dataclass(frozen=True)
class _Dim:
    """An extent of a result: a number, or the extent of an argument times one number and divided by another."""

    size: int
    tensor: int | None = None
    axis: int = 0
    times: int = 1
    divided: int = 1


@dataclass
class _Call:
    """One call of a submodule."""

    arguments: Any = None
    """Its arguments and keyword arguments, with slots for tensors and numbers of shapes."""
    result: Any = None
    """What it gives, with slots for tensors."""
    shapes: tuple[tuple[_Dim, ...], ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()


@dataclass
class Record:
    """What is known of a submodule's calls."""

    module: str
    reason: str = ""
    """Why it runs as it is."""
    calls: list[_Call] = field(default_factory=list)

    def arguments(
        self, call: int, tensors: Sequence[Any], numbers: Sequence[Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of a call with these in their slots."""

        def filled(leaf: Any) -> Any:
            if isinstance(leaf, Value):  # stands for a slot
                kind, place = leaf.name.split()
                return (tensors if kind == "tensor" else numbers)[int(place)]
            return leaf

        args, kwargs = mapped(self.calls[call].arguments, filled)
        return args, kwargs


_RECORDS: dict[str, tuple[Record, dict[str, int]]] = {}
"""By key, the submodules that stand in an export that is under way, with the calls counted so far."""


@torch.library.custom_op("pipeline::opaque", mutates_args=())
def _opaque(tensors: Sequence[torch.Tensor], numbers: Sequence[int], key: str, call: int) -> list[torch.Tensor]:  # noqa: ARG001
    raise AssertionError("this operator stands for a submodule in an export and cannot be run")


@_opaque.register_fake
def _(tensors: Sequence[torch.Tensor], numbers: Sequence[int], key: str, call: int) -> list[torch.Tensor]:  # noqa: ARG001
    found = _RECORDS[key][0].calls[call]

    def extent(dim: _Dim) -> Any:
        if dim.tensor is None:
            return dim.size
        return tensors[dim.tensor].shape[dim.axis] * dim.times // dim.divided

    like = tensors[0] if tensors else torch.empty(0)
    return [
        like.new_empty([extent(one) for one in shape], dtype=dtype)
        for shape, dtype in zip(found.shapes, found.dtypes, strict=True)
    ]


class _Stub(nn.Module):
    """Takes the place of a submodule in an export."""

    def __init__(self, key: str, training: bool) -> None:
        super().__init__()
        self._key = key
        self.training = training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        record, counts = _RECORDS[self._key]
        call = counts["calls"]
        counts["calls"] += 1
        tensors, numbers, _ = _parted((args, kwargs))
        results = torch.ops.pipeline.opaque(tensors, numbers, self._key, call)

        def filled(leaf: Any) -> Any:
            return results[int(leaf.name.split()[1])] if isinstance(leaf, Value) else leaf

        return mapped(record.calls[call].result, filled)


@contextmanager
def replaced(model: nn.Module, whole: Mapping[str, Record]) -> Iterator[dict[str, Record]]:
    """Let stubs stand for submodules of ``model``; the records by the keys that the operator is called with."""
    stubs: dict[int, _Stub] = {}
    keys = {}
    for name, record in whole.items():
        key = f"{id(model)} {name}"
        _RECORDS[key] = (record, {"calls": 0})
        keys[key] = record
        module = model.get_submodule(name)
        stubs[id(module)] = _Stub(key, module.training)
    places = [
        (owner, name, module)
        for owner in list(model.modules())
        for name, module in owner._modules.items()
        if module is not None and id(module) in stubs
    ]
    try:
        for owner, name, module in places:
            owner._modules[name] = stubs[id(module)]
        yield keys
    finally:
        for owner, name, module in places:
            owner._modules[name] = module
        for key in keys:
            del _RECORDS[key]


def recorded(model: nn.Module, inputs: Inputs, reasons: Mapping[str, str]) -> dict[str, Record]:
    """What the submodules named in ``reasons`` are called with and give, from two runs of copies of ``model``."""
    trials = []
    for images in _TRIALS:
        some = inputs.with_images(images)
        trial = copied(model, share_parameters=True)
        with torch.random.fork_rng(devices=[]), gradients_kept(trial):
            trials.append(_run(trial, some, list(reasons)))
    found = {}
    for name, reason in reasons.items():
        pairs = zip(trials[0][name], trials[1][name], strict=True)
        found[name] = Record(name, reason, [_call_of(*pair) for pair in pairs])
    return found


def _run(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, list[tuple[Any, Any]]]:
    """By submodule, the arguments and the result of each of its calls, as shapes."""
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            calls[name].append((_outlined((args, kwargs)), _outlined(result)))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in names]
    try:
        model(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@dataclass(frozen=True)
class _Outline:
    """Of a tensor all but its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Kept:
    """Keeps a tensor's outline from being taken apart as a dataclass."""

    def __init__(self, outline: _Outline) -> None:
        self.outline = outline


def _outlined(structure: Any) -> Any:
    """The structure with the outlines of its tensors."""

    def one(leaf: Any) -> Any:
        return _Kept(_Outline(tuple(leaf.shape), leaf.dtype)) if isinstance(leaf, torch.Tensor) else leaf

    return mapped(structure, one)


def _parted(structure: Any) -> tuple[list[torch.Tensor], list[Any], Any]:
    """Tensors and numbers of shapes, and the structure with slots in their places."""
    tensors: list[torch.Tensor] = []
    numbers: list[Any] = []

    def one(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
            return Value(f"tensor {len(tensors) - 1}")
        if isinstance(leaf, torch.SymInt) or (isinstance(leaf, int) and not isinstance(leaf, bool)):
            numbers.append(leaf)
            return Value(f"number {len(numbers) - 1}")
        return leaf

    return tensors, numbers, mapped(structure, one)


def _call_of(few: tuple[Any, Any], more: tuple[Any, Any]) -> _Call:
    """A call with what of it grows with the number of images, from its like for two such numbers."""
    arguments, result = few
    taken, taken_more = _outlines(arguments), _outlines(more[0])
    given, given_more = _outlines(result), _outlines(more[1])
    shapes = tuple(
        tuple(_dim(*sizes, taken, taken_more) for sizes in zip(one.shape, other.shape, strict=True))
        for one, other in zip(given, given_more, strict=True)
    )
    return _Call(
        arguments=_slotted(arguments, numbers=True),
        result=_slotted(result, numbers=False),
        shapes=shapes,
        dtypes=tuple(one.dtype for one in given),
    )


def _slotted(structure: Any, *, numbers: bool) -> Any:
    counts = {"tensor": 0, "number": 0}

    def one(leaf: Any) -> Any:
        kind = ""
        if isinstance(leaf, _Kept):
            kind = "tensor"
        elif numbers and isinstance(leaf, int) and not isinstance(leaf, bool):
            kind = "number"
        if not kind:
            return leaf
        counts[kind] += 1
        return Value(f"{kind} {counts[kind] - 1}")

    return mapped(structure, one)


def _outlines(structure: Any) -> list[_Outline]:
    found: list[_Outline] = []

    def one(leaf: Any) -> Any:
        if isinstance(leaf, _Kept):
            found.append(leaf.outline)
        return leaf

    mapped(structure, one)
    return found


def _dim(size: int, more: int, taken: Sequence[_Outline], taken_more: Sequence[_Outline]) -> _Dim:
    if size == more:
        return _Dim(size)
    for index, (one, other) in enumerate(zip(taken, taken_more, strict=True)):
        for axis, (small, large) in enumerate(zip(one.shape, other.shape, strict=True)):
            if small != large and size * large == more * small:
                return _Dim(size, index, axis, size, small)
    raise ValueError("a size does not grow evenly with the number of images")
