"""A captured model as plain data: calls of ATen operators and of whole submodules, which any process can carry out.

A call names its operator by text and its arguments as values of other calls, weights of the model, numbers that depend
on the number of images, and constants. Nothing of it is the model's own code, but for submodules that run as they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Value:
    """What another call gives, or an input of the model, by name."""

    name: str


@dataclass(frozen=True)
class Weight:
    """A parameter, a buffer or a constant tensor of the model, by its qualified name."""

    name: str


@dataclass(frozen=True)
class Images:
    """A number that depends on how many images there are: ``times * images + plus``."""

    times: int
    plus: int = 0

    def of(self, images: int) -> int:
        """The number for so many images."""
        return self.times * images + self.plus


@dataclass(frozen=True)
class Size:
    """A number computed from the number of images; ``function`` is one of Python's, by name."""

    function: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Here:
    """The device of whoever carries out the call."""


Extent = int | Images


@dataclass(frozen=True)
class Form:
    """Shape, number type and order in memory of a tensor."""

    shape: tuple[Extent, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    """Its axes from the outermost to the innermost in memory."""

    def of(self, images: int) -> tuple[int, ...]:
        """Its shape for so many images."""
        return tuple(one.of(images) if isinstance(one, Images) else one for one in self.shape)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One call."""

    name: str
    target: str
    """An operator such as ``aten.conv2d.default``, ``getitem``, or ``MODULE`` and a submodule's name."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: str
    """The innermost submodule in whose ``forward`` it is."""
    results: tuple[Form, ...]
    """Of the tensors it gives."""
    is_tensor: bool
    """Whether it gives one tensor, and no tuple of some."""
    gradients: bool = True
    """Whether gradients flow through it: not under ``torch.no_grad()``."""
    autocast: tuple[Any, ...] | None = None
    """Arguments of the ``torch.autocast`` that it runs under."""
    in_place: str = ""
    """The operator that writes to its first argument, where the model's own code calls that."""
    writes: tuple[str, ...] = ()
    """The buffers it writes to."""

    @property
    def operator(self) -> str:
        """Name of the operator without its namespace and overload."""
        return self.target.split(".")[1] if self.target.startswith("aten.") else self.target

    @property
    def form(self) -> Form | None:
        """What it gives, if that is one tensor."""
        return self.results[0] if self.is_tensor else None

    @property
    def submodule(self) -> str | None:
        """The name of the submodule it calls, ``""`` being the model itself; None for an operator."""
        return self.target.removeprefix(MODULE) if self.target.startswith(MODULE) else None

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the calls whose results it takes, each once."""
        return tuple(dict.fromkeys(one.name for one in leaves((self.args, self.kwargs)) if isinstance(one, Value)))

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of what it takes of the model's, each once."""
        return tuple(dict.fromkeys(one.name for one in leaves((self.args, self.kwargs)) if isinstance(one, Weight)))

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by the name that the operator's schema gives it."""
        if name in self.kwargs:
            return self.kwargs[name]
        names = argument_names(self.target)
        place = names.index(name) if name in names else len(self.args)
        return self.args[place] if place < len(self.args) else default

    def mapped(self, function: Callable[[Any], Any]) -> Node:
        """The same call with its leaves replaced."""
        return replace(self, args=mapped(self.args, function), kwargs=mapped(dict(self.kwargs), function))


MODULE = "module:"
INPUT = "input"
"""Target of a call that gives one of several inputs of the model; its argument is the position or the keyword."""


def mapped(structure: Any, function: Callable[[Any], Any]) -> Any:
    """A structure of tuples, lists, dictionaries and dataclasses with ``function`` of all else in it."""
    if isinstance(structure, Value | Weight | Images | Size | Here):
        return function(structure)
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(mapped(one, function) for one in structure))
    if isinstance(structure, tuple | list):
        return type(structure)(mapped(one, function) for one in structure)
    if is_dataclass(structure) and not isinstance(structure, type):
        held = ((one.name, getattr(structure, one.name)) for one in fields(structure) if one.init)
        return type(structure)(**{name: mapped(one, function) for name, one in held})
    if isinstance(structure, dict):
        made = {key: mapped(one, function) for key, one in structure.items()}
        return made if type(structure) is dict else type(structure)(made)
    return function(structure)


def leaves(structure: Any) -> Iterator[Any]:
    """All in a structure that is no tuple, list, dictionary or dataclass, in order."""
    found: list[Any] = []

    def take(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    mapped(structure, take)
    yield from found


@lru_cache(maxsize=4096)
def resolved(target: str) -> Callable[..., Any]:
    """The function that a target names; of a submodule it is not known here."""
    if target == "getitem":
        return operator.getitem
    packet: Any = torch.ops
    for part in target.split("."):
        packet = getattr(packet, part)
    found: Callable[..., Any] = packet
    return found


@lru_cache(maxsize=4096)
def argument_names(target: str) -> tuple[str, ...]:
    """The names that the schema of an operator gives its arguments."""
    schema = getattr(resolved(target), "_schema", None) if not target.startswith((MODULE, INPUT)) else None
    return tuple(one.name for one in schema.arguments) if schema is not None else ()


def number(given: Images | Size | Any, images: int) -> Any:
    """A number for so many images."""
    if isinstance(given, Images):
        return given.of(images)
    if isinstance(given, Size):
        return _FUNCTIONS[given.function](*(number(one, images) for one in given.arguments))
    return given


def filled(template: Any, values: Mapping[str, Any], images: int = 0) -> Any:
    """A structure with tensors in the places of their names, and numbers for so many images."""
    return mapped(template, lambda leaf: values[leaf.name] if isinstance(leaf, Value) else number(leaf, images))


def _power(base: Any, exponent: Any) -> Any:
    return base**exponent


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
    },
    "pow": _power,
    "sqrt": math.sqrt,
    "ceil": math.ceil,
    "floor": math.floor,
    "trunc": math.trunc,
    "round": round,
    "log": math.log,
    "sym_float": float,
    "sym_int": int,
    "sym_max": max,
    "sym_min": min,
    "sym_sum": sum,
    "sym_not": operator.not_,
    "_sym_sqrt": math.sqrt,
}


def is_size_function(name: str) -> bool:
    """Whether numbers can be computed by a function of this name."""
    return name in _FUNCTIONS
