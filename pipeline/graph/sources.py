"""Tensors made of sizes alone, whatever tensor they were made after: zeros, ones, and memory for random numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.graph.capture import Captured
from pipeline.graph.nodes import Form, Here, Node, Value

_LIKE = {"empty_like", "new_empty", "zeros_like", "new_zeros", "ones_like", "new_ones", "full_like", "new_full"}
_FILLED = {
    "rand_like": "aten.uniform_.default", "randn_like": "aten.normal_.default", "bernoulli.p": "aten.bernoulli_.float",
}  # fmt: skip


def without_examples(captured: Captured) -> Captured:
    """The same calls, of which those that look at a tensor for its size only name the size."""
    nodes: list[Node] = []
    for node in captured.nodes:
        nodes += _named(node)
    return replace(captured, nodes=tuple(nodes))


def _named(node: Node) -> list[Node]:
    if node.operator in _LIKE and node.form is not None:
        return [_made(node, node.form)]
    packet = ".".join(node.target.split(".")[1:])
    filler = _FILLED.get(node.operator) or _FILLED.get(packet)
    if filler is None or node.form is None or "generator" in node.kwargs:
        return [node]
    memory = replace(_made(replace(node, target="aten.empty_like.default"), node.form), name=f"{node.name}_memory")
    rest = node.args[1:] if packet == "bernoulli.p" else ()
    return [memory, replace(node, target=filler, args=(Value(memory.name), *rest), kwargs={})]


def _made(node: Node, form: Form) -> Node:
    size: list[Any] = list(form.shape)
    kwargs = {"dtype": form.dtype, "device": Here()}
    name = node.operator.removesuffix("_like").removeprefix("new_")
    if name == "empty":
        return replace(node, target="aten.empty_permuted.default", args=(size, list(form.order)), kwargs=kwargs)
    if name == "full":
        value = node.argument("fill_value")
        return replace(node, target="aten.full.default", args=(size, value), kwargs=kwargs)
    return replace(node, target=f"aten.{name}.default", args=(size,), kwargs=kwargs)
