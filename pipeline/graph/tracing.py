"""From a model to an ``fx.GraphModule`` without surprises: no node writes to what another reads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from pipeline.graph.effects import TABLE, random_kind

EVALUATION = "evaluation arguments"
"""Key in a node's ``meta``: its (args, kwargs) in evaluation mode, where they differ from those in training."""

_IN_PLACE_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ipow: operator.pow,
}  # fmt: skip
_VIEWS = {"view", "reshape", "transpose", "permute", "squeeze", "unsqueeze", "flatten", "chunk", "split", "narrow", "t"}


class _Whole(nn.Module):
    """A model that cannot be traced, as a single operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


class _Untraceable(Exception):  # noqa: N818 - never leaves this module
    """The innermost submodule that could not be traced."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Tracer(fx.Tracer):
    """Keeps whole what the table knows, what has hooks, and what has turned out to be untraceable."""

    def __init__(self, whole: set[str]) -> None:
        super().__init__()
        self._kept_whole = whole
        self._inside: list[str] = []
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = type(m) in TABLE or random_kind(m) is not None
        kept = module_qualified_name in self._kept_whole or isinstance(self.root, _Whole)
        return known or kept or has_hooks(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._inside.append(self.path_of_module(m))
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self._inside[-1]
            raise
        finally:
            self._inside.pop()
        return result


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its ``forward``."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def traced(model: nn.Module) -> fx.GraphModule:
    """The model in training mode as an ``fx.GraphModule`` over its own submodules (shared, not copied).

    Submodules whose control flow depends on data cannot be traced and stay whole; if that is the model itself, it
    becomes one operation. In-place operations become ordinary ones, and what was read after one reads its result.
    """
    own = set(vars(model))
    whole: set[str] = set()
    try:
        while True:
            tracer = _Tracer(whole)
            try:
                return _checked(model, tracer, whole)
            except _Untraceable as culprit:
                if not culprit.name or culprit.name in whole:
                    break
                whole.add(culprit.name)
        wrapped = _Whole(model)
        return fx.GraphModule(wrapped, _Tracer(set()).trace(wrapped))
    finally:
        # The tracer leaves constants on the model, under other names each time; the graph has its own.
        for name in set(vars(model)) - own:
            delattr(model, name)


def _checked(model: nn.Module, tracer: _Tracer, whole: set[str]) -> fx.GraphModule:
    try:
        with _mode(model, training=True):
            graph = tracer.trace(model)
    except Exception as error:  # fx fails in as many ways as there are models
        raise _Untraceable(tracer.failed or "") from error
    graph_module = fx.GraphModule(model, graph)
    _remove_writes(graph_module)
    _note_evaluation(graph_module, model, whole)
    _remove_unused(graph_module.graph)
    _keep_parts_together(graph_module.graph)
    return graph_module


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _remove_writes(graph_module: fx.GraphModule) -> None:
    """A segment's input is a leaf of its own, which must not be written to."""
    for node in graph_module.graph.nodes:
        if not _make_ordinary(node, graph_module):
            continue
        target = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(target, fx.Node):
            raise _Untraceable("")
        if target.op == "call_method" and target.target in _VIEWS:
            raise _Untraceable("")  # writes through a view to a tensor that others may read
        seen = False
        for user in graph_module.graph.nodes:
            if seen:
                user.replace_input_with(target, node)
            seen = seen or user is node


def _make_ordinary(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Replace an in-place call by its ordinary form; whether it was one."""
    if node.op == "call_module":
        return bool(getattr(graph_module.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    if node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
        node.target = _IN_PLACE_OPERATORS[node.target]
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_function" and node.target is operator.setitem:
        raise _Untraceable("")
    if not name.endswith("_") or name.startswith("_"):
        return False
    places: tuple[Any, ...] = (torch.Tensor,) if node.op == "call_method" else (torch, F)
    ordinary = next((getattr(place, name[:-1]) for place in places if hasattr(place, name[:-1])), None)
    if ordinary is None:
        raise _Untraceable("")
    node.target = name[:-1] if node.op == "call_method" else ordinary
    return True


def _note_evaluation(graph_module: fx.GraphModule, model: nn.Module, whole: set[str]) -> None:
    """Find out what the model does otherwise in evaluation mode, such as ``F.dropout(x, training=self.training)``.

    Where only arguments differ, the nodes remember theirs; where the graphs differ, the graph module says so.
    """
    try:
        with _mode(model, training=False):
            other = fx.GraphModule(model, _Tracer(whole).trace(model))
        _remove_writes(other)
    except Exception:  # noqa: BLE001 - as for training
        graph_module.meta[EVALUATION] = False
        return
    ours, theirs = list(graph_module.graph.nodes), list(other.graph.nodes)
    same = len(ours) == len(theirs) and all(
        (one.op, one.target, one.name) == (two.op, two.target, two.name) for one, two in zip(ours, theirs, strict=True)
    )
    graph_module.meta[EVALUATION] = same
    if not same:
        return
    by_name = {node.name: node for node in ours}
    for one, two in zip(ours, theirs, strict=True):
        args, kwargs = fx.map_arg((two.args, two.kwargs), lambda node: by_name[node.name])
        if (args, kwargs) != (one.args, one.kwargs):
            one.meta[EVALUATION] = (args, kwargs)


def _remove_unused(graph: fx.Graph) -> None:
    """Drop calls that only look at something and whose result nobody uses."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "call_method", "get_attr") and not node.users:
            graph.erase_node(node)


def _keep_parts_together(graph: fx.Graph) -> None:
    """Take several results apart right after the call that gave them, so that they need not be kept as one."""
    for node in reversed(list(graph.nodes)):
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
            node.args[0].append(node)
