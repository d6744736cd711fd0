"""In-place operations become ordinary ones: a segment's input is a leaf of its own, which must not be written to."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from pipeline.graph.effects import TABLE, random_kind

ORDINARY_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.ipow: operator.pow, operator.iand: operator.and_, operator.ior: operator.or_,
    operator.ixor: operator.xor,
}  # fmt: skip
"""By in-place operator, the ordinary one."""
_MAY_SHARE_MEMORY = {
    "view", "view_as", "reshape", "reshape_as", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims",
    "squeeze", "unsqueeze", "flatten", "unflatten", "ravel", "chunk", "split", "tensor_split", "narrow", "select",
    "unbind", "diagonal", "unfold", "expand", "expand_as", "t", "contiguous", "to", "type", "type_as", "float",
    "double", "half", "bfloat16", "cpu", "cuda", "detach", "getitem",
}  # fmt: skip
_MEMORY_ATTRIBUTES = ("T", "mT", "H", "mH", "data", "real")
_LOOKS = ("size", "dim", "ndimension", "numel", "stride", "item")


IN_PLACE = "in place"
"""Key in a node's ``meta``: whether the model's own code has it write to its first input."""
NO_GRADIENT = "no gradient"
"""Key in a node's ``meta``: whether it runs under ``torch.no_grad()``."""


class Untraceable(Exception):  # noqa: N818 - never leaves this package
    """The innermost submodule that has to stay whole, by name; ``""`` is the model itself."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def with_item(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """What ``x`` is after ``x[index] = value``, as a tensor of its own."""
    changed = x.clone()
    changed[index] = value
    return changed


def remove_writes(graph_module: fx.GraphModule) -> None:
    """Let no operation write to what another one reads.

    What read a tensor after it was written to reads the result of the ordinary operation instead. Raises
    ``Untraceable`` where that is not all: if parts of the written memory are read under another name, or if it is the
    model's own, or hidden from gradients.
    """
    memory, position = _Memory(), {node: index for index, node in enumerate(graph_module.graph.nodes)}
    numbers: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if _is_number(node, numbers):
            numbers.add(node)
        written = _made_ordinary(node, graph_module)
        if written is None:
            if _may_share(node, graph_module):
                for source in node.all_input_nodes:
                    memory.join(node, source)
            continue
        if written in numbers or _is_written_back(node, written):
            continue  # adding to a number leaves the number as it was
        sharing = memory.of(written)
        others = [one for one in sharing if one is not written]
        late = [user for one in others for user in one.users if position[user] > position[node]]
        own = any(one.op == "get_attr" for one in sharing)
        # Written to under no_grad, a tensor passes gradients on as if it had not been.
        hidden = node.meta.get(NO_GRADIENT) and not written.meta.get(NO_GRADIENT)
        if own or late or hidden:
            raise Untraceable(_common_module([node, *sharing]))
        for user in list(written.users):
            if position[user] > position[node]:
                user.replace_input_with(written, node)
        memory.join(node, written)


class _Memory:
    """Which values may be in the same memory."""

    def __init__(self) -> None:
        self._groups: dict[fx.Node, set[fx.Node]] = {}

    def of(self, node: fx.Node) -> set[fx.Node]:
        return self._groups.setdefault(node, {node})

    def join(self, one: fx.Node, other: fx.Node) -> None:
        together = self.of(one) | self.of(other)
        for node in together:
            self._groups[node] = together


def _may_share(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether the result may be in the memory of what the node takes."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if random_kind(module) is not None:
            return float(str(module.p)) == 0
        return type(module) not in TABLE or isinstance(module, nn.Identity)
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _MEMORY_ATTRIBUTES
    return node.op in ("call_function", "call_method") and _name(node) in _MAY_SHARE_MEMORY


def _is_number(node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Whether a value is a number, or a tuple of numbers, and no tensor."""
    if node.op == "call_method":
        return node.target in _LOOKS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    inputs = node.all_input_nodes
    return getattr(node.target, "__module__", "") == "_operator" and bool(inputs) and numbers.issuperset(inputs)


def _is_written_back(node: fx.Node, written: fx.Node) -> bool:
    """Whether this is the first half of ``x[index] += y``, which ends in ``x[index] = ...``."""
    following = node.next
    return following.target is operator.setitem and following.args == (*written.args, node)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _made_ordinary(node: fx.Node, graph_module: fx.GraphModule) -> fx.Node | None:
    """Replace an in-place call by its ordinary form; what it used to write to."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        node.meta[IN_PLACE] = bool(getattr(module, "inplace", False)) and random_kind(module) is None
        return _written(node) if getattr(module, "inplace", False) else None
    if node.op not in ("call_function", "call_method"):
        return None
    if node.kwargs.get("out") is not None:
        raise Untraceable(_common_module([node]))
    if node.op == "call_function":
        if node.target in ORDINARY_OPERATORS:
            node.meta[IN_PLACE] = node.target is operator.iadd
            node.target = ORDINARY_OPERATORS[node.target]
            return _written(node)
        if node.target is operator.setitem:
            node.target = with_item
            return _written(node)
        if _without_in_place_argument(node):
            return _written(node)
    name = _name(node)
    if not name.endswith("_") or name.startswith("_"):
        return None
    places: tuple[Any, ...] = (torch.Tensor,) if node.op == "call_method" else (torch, F)
    ordinary = next((found for place in places if callable(found := getattr(place, name[:-1], None))), None)
    if ordinary is None:
        raise Untraceable(_common_module([node, *node.all_input_nodes]))
    node.target = name[:-1] if node.op == "call_method" else ordinary
    return _written(node)


def _without_in_place_argument(node: fx.Node) -> bool:
    """Switch off ``inplace=True``, by name or by position; whether it was on."""
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # built in, and so without such an argument
        return False
    if not given.arguments.get("inplace"):
        return False
    given.arguments["inplace"] = False
    node.args, node.kwargs = given.args, given.kwargs
    return True


def _written(node: fx.Node) -> fx.Node:
    target = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(target, fx.Node):
        raise Untraceable(_common_module([node, *node.all_input_nodes]))
    return target


def _common_module(nodes: Iterable[fx.Node]) -> str:
    """The innermost submodule in whose ``forward`` all of ``nodes`` are."""
    paths = []
    for node in nodes:
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        paths.append(stack[:-1] if node.op == "call_module" else stack)
    common = [level[0] for level in zip(*paths, strict=False) if len(set(level)) == 1]
    return common[-1] if common else ""
