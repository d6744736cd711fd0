"""From a model to an ``fx.GraphModule`` without surprises: no node writes to what another reads."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pipeline.graph.effects import RANDOM_FUNCTIONS, TABLE, random_kind
from pipeline.graph.writes import NO_GRADIENT, ORDINARY_OPERATORS, Untraceable, remove_writes

EVALUATION = "evaluation arguments"
"""Key in a node's ``meta``: its (args, kwargs) in evaluation mode, where they differ from those in training."""
TRAINING = "training"
"""Key in a node's ``meta``: whether its module is in training mode when the model is."""


class _Whole(nn.Module):
    """A model that cannot be traced, as a single operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


class _Proxy(fx.Proxy):
    """Knows ``x[...] = y`` and that ``x += y`` writes to ``x``, of which fx makes ``x = x + y``."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _in_place(target: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _operator in ORDINARY_OPERATORS:
    setattr(_Proxy, f"__{_operator.__name__}__", _in_place(_operator))


class _Tracer(fx.Tracer):
    """Keeps whole what the table knows, what has hooks, and what has turned out to be untraceable."""

    proxy_buffer_attributes = True  # a forward that changes a buffer must not change it during the trace

    def __init__(self, whole: set[str]) -> None:
        super().__init__()
        self._kept_whole = whole
        self._inside: list[str] = []
        self._with_gradients = torch.is_grad_enabled()
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

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[NO_GRADIENT] = self._with_gradients and not torch.is_grad_enabled()
        return node


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
    whole: set[str] = set()
    while True:
        try:
            return _checked(model, whole)
        except Untraceable as culprit:
            if not culprit.name or culprit.name in whole:
                break
            whole.add(culprit.name)
    wrapped = _Whole(model)
    return fx.GraphModule(wrapped, _Tracer(set()).trace(wrapped))


def modes(model: nn.Module, *, training: bool) -> dict[nn.Module, bool]:
    """Whether each module is in training mode when the model is (or is not): some keep their BatchNorm out of it."""
    with _as_it_was(model):
        model.train(training)
        return {module: module.training for module in model.modules()}


def _checked(model: nn.Module, whole: set[str]) -> fx.GraphModule:
    with _as_it_was(model) as before:
        model.train()
        tracer = _Tracer(whole)
        try:
            graph = tracer.trace(model, _defaults(model))
        except Exception as error:  # fx fails in as many ways as there are models
            raise Untraceable(tracer.failed or "") from error
        _refuse_state(model, before)
        graph_module = fx.GraphModule(model, graph)
        for node in graph.nodes:
            if node.op == "call_module":
                node.meta[TRAINING] = model.get_submodule(str(node.target)).training
    remove_writes(graph_module)
    _note_evaluation(graph_module, model, whole)
    _remove_unused(graph_module.graph)
    _keep_parts_together(graph_module.graph)
    graph_module.recompile()
    return graph_module


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The optional arguments of ``forward``, which branches may depend on, at their defaults."""
    given = inspect.signature(model.forward).parameters.values()
    return {
        one.name: one.default
        for one in given
        if one.kind is one.POSITIONAL_OR_KEYWORD
        and (one.default is None or isinstance(one.default, bool | int | float | str))
    }


Attributes = dict[nn.Module, dict[str, Any]]


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[Attributes]:
    """Undo all that is done to the attributes of modules: modes, constants, and what ``forward`` leaves behind."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = {module: {name: _copied(value) for name, value in vars(module).items()} for module in modules}
    held = {module: dict(vars(module)) for module in before}
    try:
        yield before
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            for name, value in attributes.items():
                original = held[module][name]
                if isinstance(original, dict):
                    original.clear()
                    original.update(value)
                elif isinstance(original, list):
                    original[:] = value
                vars(module)[name] = original


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list) else value


def _refuse_state(model: nn.Module, before: Mapping[nn.Module, Mapping[str, Any]]) -> None:
    """Raise ``Untraceable`` for a module that counts or keeps something from call to call, which a trace would not."""
    for name, module in model.named_modules():
        attributes = before.get(module, {})
        buffers = module._buffers.items()
        if any(tensor is not attributes["_buffers"].get(buffer, tensor) for buffer, tensor in buffers):
            raise Untraceable(name)
        for attribute, old in attributes.items():
            new = vars(module).get(attribute, old)
            kept = attribute == "training" or isinstance(old, dict | list) or _is_traced(new)
            if not kept and new is not old and (isinstance(new, torch.Tensor) or new != old):
                raise Untraceable(name)


def _is_traced(value: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(value))


def _note_evaluation(graph_module: fx.GraphModule, model: nn.Module, whole: set[str]) -> None:
    """Find out what the model does otherwise in evaluation mode, such as ``F.dropout(x, training=self.training)``.

    Where only arguments differ, the nodes remember theirs; where the graphs differ, the graph module says so.
    """
    try:
        with _as_it_was(model):
            model.eval()
            other = fx.GraphModule(model, _Tracer(whole).trace(model, _defaults(model)))
        remove_writes(other)
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
    """Drop calls that only look at something and whose result nobody uses; but a mask is drawn all the same."""
    for node in reversed(list(graph.nodes)):
        looks = node.op in ("call_function", "call_method", "get_attr") and node.target not in RANDOM_FUNCTIONS
        if looks and not node.users:
            graph.erase_node(node)


def _keep_parts_together(graph: fx.Graph) -> None:
    """Take several results apart right after the call that gave them, so that they need not be kept as one."""
    for node in reversed(list(graph.nodes)):
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
            node.args[0].append(node)
