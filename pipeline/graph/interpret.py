"""Carry out calls: the one way in which a captured model runs, in a check of it and in a training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.graph.nodes import (
    INPUT,
    MODULE,
    Here,
    Images,
    Node,
    Size,
    Value,
    Weight,
    leaves,
    mapped,
    number,
    resolved,
)

Lookup = Callable[[str], Any]


class Caller:
    """One call, made ready for being carried out many times."""

    def __init__(self, node: Node, device: torch.device | str = "cpu", module: nn.Module | None = None) -> None:
        """``module`` is the submodule that a call of one means."""
        self.node = node
        self._function: Callable[..., Any] = module if module is not None else _function(node)
        here = torch.device(device)
        self.args: tuple[Any, ...] = mapped(node.args, lambda one: here if isinstance(one, Here) else one)
        self.kwargs: dict[str, Any] = mapped(dict(node.kwargs), lambda one: here if isinstance(one, Here) else one)
        self._flat = not self.kwargs and not any(_is_nested(one) for one in self.args)
        self._plain = not any(isinstance(one, Images | Size) for one in leaves((self.args, self.kwargs)))
        self._context = _context(node)

    def __call__(self, value: Lookup, weight: Lookup, images: int) -> Any:
        """Carry it out; ``value`` and ``weight`` give tensors by name, ``images`` is what sizes go by."""
        args, kwargs = self.arguments(value, weight, images)
        return self.run(args, kwargs)

    def arguments(self, value: Lookup, weight: Lookup, images: int) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """What it is called with."""

        def found(leaf: Any) -> Any:
            kind = type(leaf)
            if kind is Value:
                return value(leaf.name)
            if kind is Weight:
                return weight(leaf.name)
            return number(leaf, images) if kind is Images or kind is Size else leaf

        if self._flat:
            return [found(one) for one in self.args], {}
        return mapped(self.args, found), mapped(self.kwargs, found)

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any], function: Callable[..., Any] | None = None) -> Any:
        """Carry it out with these arguments, by ``function`` instead of its own where there is one."""
        chosen = function or self._function
        if self._context is None:
            return chosen(*args, **kwargs)
        with self._context():
            return chosen(*args, **kwargs)


def tensors_in(result: Any) -> list[torch.Tensor]:
    """The tensors of what a submodule gives, in order."""
    return [one for one in leaves(result) if isinstance(one, torch.Tensor)]


def run_all(
    nodes: Sequence[Node],
    values: dict[str, Any],
    weights: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    images: int,
    note: Callable[[Node, Any], None] = lambda _, __: None,
) -> dict[str, Any]:
    """Carry out calls in order on the CPU and add their results to ``values``; ``note`` is told each."""
    for node in nodes:
        module = modules[node.submodule] if node.submodule is not None else None
        result = Caller(node, module=module)(values.__getitem__, weights.__getitem__, images)
        if module is not None:
            result = tensors_in(result)
        note(node, result)
        values[node.name] = result
    return values


def _function(node: Node) -> Callable[..., Any]:
    if node.target.startswith(MODULE) or node.target == INPUT:
        return _not_here
    return resolved(node.target)


def _not_here(*_: Any, **__: Any) -> Any:
    raise AssertionError("a submodule is called where it is not")


def _is_nested(given: Any) -> bool:
    return isinstance(given, tuple | list | dict)


def _context(node: Node) -> Callable[[], contextlib.AbstractContextManager[Any]] | None:
    """What a call runs under; None for nothing."""
    if node.gradients and node.autocast is None:
        return None

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if not node.gradients:
                stack.enter_context(torch.no_grad())
            if node.autocast is not None:
                kind, dtype, enabled, cache = node.autocast
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield

    return both
