"""Names and words for calls: those of operations as people know them, and what a call does without its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from pipeline.graph.capture import Captured
from pipeline.graph.judging import CONVOLUTIONS
from pipeline.graph.nodes import Node, Value, Weight, mapped

_LAYERS = {*CONVOLUTIONS, "linear", "batch_norm", "group_norm", "layer_norm", "instance_norm", "prelu", "embedding"}


class Names:
    """The names of operations: those of modules where a call is all that a module does, else of the operator."""

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self._modules = dict(model.named_modules())
        self._known: dict[str, str] = {}
        taken: Counter[str] = Counter()
        for name in captured.inputs:
            self._known[name] = self._unique(name if len(captured.inputs) > 1 else "input", taken)
        for node in captured.nodes:
            self._known[node.name] = self._unique(self._wanted(node), taken)

    def __getitem__(self, name: str) -> str:
        return self._known[name]

    def _wanted(self, node: Node) -> str:
        if node.submodule is not None:
            return _identifier(node.submodule) or "model"
        module = self._modules.get(node.module)
        owned = any(name.rpartition(".")[0] == node.module for name in node.weights)
        leaf = module is not None and not module._modules and type(module).__module__.startswith("torch.nn")
        if node.writes:
            return f"{_identifier(node.writes[0])}_written"
        if node.module and node.target != "getitem" and (leaf or (owned and node.operator in _LAYERS)):
            return _identifier(node.module)
        return node.operator.strip("_")

    def _unique(self, wanted: str, taken: Counter[str]) -> str:
        name = wanted
        while name in taken:
            taken[wanted] += 1
            name = f"{wanted}_{taken[wanted]}"
        taken[name] += 0
        return name


def _identifier(path: str) -> str:
    name = path.replace(".", "_")
    return f"_{name}" if name[:1].isdigit() else name


def described(nodes: Sequence[Node], model: nn.Module) -> str:
    """What calls do, without names of layers and values of tensors."""
    parts = []
    for node in nodes:
        module = None if node.submodule is None else model.get_submodule(node.submodule)
        target = node.target if module is None else f"{type(module).__qualname__} {_text(module)}"
        args, kwargs = mapped((node.args, dict(node.kwargs)), _blank)
        parts.append(f"{target}{args}{kwargs or ''}")
    return "; ".join(parts)


def _blank(leaf: Any) -> Any:
    return "_" if isinstance(leaf, Value | Weight) else leaf


def _text(module: nn.Module) -> str:
    """The text of a module; where a part of it has a text of its own, only the types of such parts.

    Their text may tell values of weights or addresses. Names and shapes of parameters are told beside it anyway.
    """
    if all(_has_usual_text(one) for one in module.modules()):
        return str(module)
    parts = (
        f"{name}: {type(one).__qualname__}({one.extra_repr() if _has_usual_text(one) else ''})"
        for name, one in module.named_modules()
    )
    return ", ".join(parts)


def _has_usual_text(module: nn.Module) -> bool:
    methods = type(module).extra_repr, type(module).__repr__
    return all(one.__module__.partition(".")[0] in ("torch", "torchvision") for one in methods)
