"""What captured calls are in evaluation mode: the same ones, told so where it matters to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.graph.nodes import Node, argument_names


def evaluated(nodes: Sequence[Node]) -> dict[str, Node | None]:
    """By name, the calls that are others in evaluation, as it mostly is; None for those that are left out.

    A guess, to be compared with the model: dropout drops nothing, BatchNorm goes by what it knows, masks of stochastic
    depth are at their mean, so that what is divided by it is left as it was, and no buffer is written to.
    """
    return {node.name: _evaluated(node) for node in nodes if _differs(node)}


def _differs(node: Node) -> bool:
    return bool(node.writes) or node.operator == "bernoulli_" or bool(_switched(node))


def _switched(node: Node) -> str:
    """The argument that says whether a call is part of a training, if that is on."""
    if node.operator == "batch_norm":
        return "training" if node.argument("training") and node.argument("running_mean") is not None else ""
    if node.operator == "instance_norm":
        own = node.argument("use_input_stats") and node.argument("running_mean") is not None
        return "use_input_stats" if own else ""
    names = argument_names(node.target) if node.target.startswith("aten.") else ()
    for name in ("train", "training"):
        if name in names and node.argument(name):
            return name
    return ""


def _evaluated(node: Node) -> Node | None:
    if node.writes:
        return None
    if node.operator == "bernoulli_":
        return replace(node, target="aten.fill_.Scalar", args=(node.args[0], node.argument("p", 0.5)), kwargs={})
    names, switched = argument_names(node.target), _switched(node)
    args = tuple(False if names[place] == switched else one for place, one in enumerate(node.args))
    return replace(node, args=args, kwargs={**node.kwargs, **({switched: False} if switched in node.kwargs else {})})
