"""From captured calls to operations: what leads to each from weights and sizes, and what each does to a layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pipeline.graph.axes import operands_of
from pipeline.graph.capture import Captured
from pipeline.graph.check import Facts
from pipeline.graph.copies import tensors_of
from pipeline.graph.effects import Effect
from pipeline.graph.judging import CONVOLUTIONS, DROPOUTS, Dependence, Judge, Judgement, place_of
from pipeline.graph.naming import Names, described
from pipeline.graph.nodes import INPUT, Form, Images, Node, Value, leaves, mapped
from pipeline.graph.operations import Graph, Operation, Parameter

_FILLS = ("bernoulli_", "uniform_", "normal_", "exponential_", "rand", "randn", "randint", "randperm")
"""Random numbers of which every rank can draw all and take its part."""
_WRITTEN = (
    "relu_", "relu6_", "leaky_relu_", "elu_", "celu_", "selu_", "silu_", "mish_", "hardswish_", "hardtanh_",
    "hardsigmoid_", "threshold_", "add_",
)  # fmt: skip
"""Operators that a run lets write to their first argument where the model's own code does."""
_INDEXING = ("max_pool", "adaptive_max_pool", "fractional_max_pool")


class Analysis:
    """The operations of one captured model."""

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        facts: Facts,
        trained: frozenset[str],
        dtype: torch.dtype,
        keys: Sequence[int | str],
    ) -> None:
        self._model, self._captured, self._facts, self._trained = model, captured, facts, trained
        self._dtype, self._keys = dtype, keys
        self._tensors = {**tensors_of(model), **captured.constants}
        self._nodes = {node.name: node for node in captured.nodes}
        self._forms = self._all_forms()
        self._weights = {
            name: Form(tuple(tensor.shape), tensor.dtype, tuple(range(tensor.dim())))
            for name, tensor in self._tensors.items()
        }
        self._names = Names(model, captured)
        self._counters = self._batch_counters()
        written = frozenset(name for node in captured.nodes if node.name not in self._counters for name in node.writes)
        self._varying, self._touched = self._dependence(written)
        self._drawing = [node for node in captured.nodes if node.name in facts.drawing]
        self._in_order = any(self._is_unpredictable(node) for node in self._drawing)
        self._sources = {node.name for node in self._drawing if node.name not in self._varying and not self._in_order}
        drawing = frozenset(node.name for node in self._drawing)
        dependence = Dependence(self._varying, self._touched, written, drawing, self._in_order)
        self._judge = Judge(self._nodes, self._forms, self._weights, dependence)
        self._places = self._judge.places
        self._useful = self._differentiable()

    def graph(self) -> Graph:
        """All operations in order."""
        captured = self._captured
        first, *others = captured.inputs
        for name, form in zip(captured.inputs, captured.forms, strict=True):
            self._places[name] = place_of(form)
        operations = [
            self._input(name, form, key)
            for name, form, key in zip(others, captured.forms[1:], self._keys[1:], strict=True)
        ]
        returned = {one.name for one in leaves(captured.returned) if isinstance(one, Value)}
        for node in captured.nodes:
            if node.name in self._counters:
                continue
            alone = node.name not in self._varying and node.name not in self._touched
            draws = node.name in self._facts.drawing and self._in_order
            if alone and not node.writes and not draws and node.name not in returned:
                continue
            operations.append(self._operation(node))
        outputs = [self._names[one] for one in _values(captured.returned)]
        drawn_names = [self._name_of(node.name) for node in self._drawing if not self._in_order]
        return Graph(
            input=self._names[first],
            input_shape=_integers(captured.forms[0].shape[1:]),
            dtype=self._dtype,
            operations=tuple(operations),
            outputs=tuple(dict.fromkeys(outputs)),
            returned=mapped(captured.returned, self._renamed),
            evaluable=False,
            sources=tuple(
                self._in_names(one)
                for one in self._closure([node for node in self._drawing if node.name in self._sources])
            ),
            drawn=tuple(drawn_names),
            constants=captured.constants,
            inputs=tuple(self._keys),
        )

    def _input(self, name: str, form: Form, key: int | str) -> Operation:
        node = Node(
            name=name, target=INPUT, args=(key,), kwargs={}, module="", results=(form,), is_tensor=True
        )  # fmt: skip
        self._nodes[name] = node
        return self._made(node, [], Judgement(Effect.WHOLE, place_of(form)))

    def _operation(self, node: Node) -> Operation:
        judgement = self._judge.judge(node)
        self._places[node.name] = judgement.place
        before = self._closure([node])[:-1]
        if node.operator == "batch_norm":
            before += [self._nodes[name] for name, module in self._counters.items() if module == node.name]
        return self._made(node, before, judgement)

    def _made(self, node: Node, before: Sequence[Node], judgement: Judgement) -> Operation:
        place, form = judgement.place, node.form
        shape = _integers(form.shape[1:]) if place.travels and form is not None else None
        nodes = tuple(self._in_names(one) for one in (*before, node))
        taken = dict.fromkeys(
            name for one in (*before, node) for name in one.values if name in self._varying or self._is_operation(name)
        )
        inputs = tuple(self._names[name] for name in taken)
        convolution = node.operator in CONVOLUTIONS
        return Operation(
            name=self._names[node.name],
            effect=judgement.effect,
            nodes=nodes,
            call=described((*before, node), self._model),
            text="" if node.submodule is None else str(self._model.get_submodule(node.submodule)),
            inputs=inputs,
            shape=shape,
            dtype=form.dtype if form is not None else self._dtype,
            images_axis=place.images or 0,
            per_image=place.per_image if place.images is not None else 0,
            channel_axis=place.channels if shape and place.channels <= len(shape) else 1,
            unit=judgement.unit,
            input_unit=judgement.input_unit,
            noise=judgement.noise,
            cuts=judgement.cuts or {},
            keeps_indices=node.operator.startswith(_INDEXING),
            in_place=self._may_write(node) and judgement.effect is Effect.CHANNELWISE,
            parameters=self._parameters((*before, node), judgement),
            differentiable=node.name in self._useful,
            flops_per_image=self._flops(node),
            convolution=convolution,
            module=node.module,
        )

    def _is_operation(self, name: str) -> bool:
        """Whether a value is that of an operation or an input, and not made anew by whatever takes it."""
        return name in self._captured.inputs or name in self._varying or name in self._touched or name in self._places

    # What depends on what.

    def _all_forms(self) -> dict[str, Form]:
        forms = dict(zip(self._captured.inputs, self._captured.forms, strict=True))
        for node in self._captured.nodes:
            if node.results:
                forms[node.name] = node.results[0]
        return forms

    def _batch_counters(self) -> dict[str, str]:
        """The calls that count the batches of a BatchNorm, by name, with the call of that BatchNorm."""
        found = {}
        used = {name for node in self._captured.nodes for name in node.values}
        following: dict[str, str] = {}
        for node in reversed(self._captured.nodes):
            if node.operator == "batch_norm":
                following[node.module] = node.name
            counts = bool(node.writes) and node.writes[0].endswith("num_batches_tracked") and not node.values
            if counts and node.name not in used and node.module in following:
                found[node.name] = following[node.module]
        return found

    def _dependence(self, written: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
        """The values that depend on images; and those that do not, but on buffers that are written to."""
        varying, touched = set(self._captured.inputs), set()
        for node in self._captured.nodes:
            if node.name in self._counters:
                continue
            if any(name in varying for name in node.values) or node.submodule is not None:
                varying.add(node.name)
            elif (
                node.writes
                or any(name in written for name in node.weights)
                or any(name in touched for name in node.values)
            ):
                touched.add(node.name)
        return frozenset(varying), frozenset(touched)

    def _is_unpredictable(self, node: Node) -> bool:
        if node.name in self._touched or node.submodule is not None or node.autocast is not None:
            return True
        if node.name not in self._varying:
            return node.operator not in _FILLS
        return node.operator not in DROPOUTS or len(node.values) != 1

    def _differentiable(self) -> set[str]:
        """The calls through which a gradient flows, from what the model returns to something that is trained."""
        wanted = {one.name for one in leaves(self._captured.returned) if isinstance(one, Value)}
        found = set()
        for node in reversed(self._captured.nodes):
            if node.name in wanted and node.name in self._facts.differentiable:
                found.add(node.name)
                wanted.update(node.values)
        return found

    def _closure(self, nodes: Sequence[Node]) -> list[Node]:
        """Calls, in order, with what leads to them from weights and sizes alone."""
        found: dict[str, Node] = {}

        def take(node: Node) -> None:
            for name in node.values:
                if name in self._varying or name in self._touched or (name in self._sources and node.name != name):
                    continue
                if name not in found and name in self._nodes and name not in self._places:
                    take(self._nodes[name])
            found[node.name] = node

        for node in nodes:
            take(node)
        return list(found.values())

    # What an operation has of the model.

    def _parameters(self, nodes: Sequence[Node], judgement: Judgement) -> tuple[Parameter, ...]:
        names = dict.fromkeys(name for node in nodes for name in node.weights)
        for node in nodes:
            if node.submodule is not None:
                prefix = f"{node.submodule}." if node.submodule else ""
                owned = {id(one) for one in _state(self._model.get_submodule(node.submodule))}
                names.update(dict.fromkeys(name for name, one in self._tensors.items() if id(one) in owned))
                names.update(dict.fromkeys(name for name in self._tensors if prefix and name.startswith(prefix)))
        found = []
        for name in names:
            if name in self._captured.constants:
                continue
            tensor = self._tensors[name]
            own, of_input = (judgement.axes or {}).get(name, (None, None))
            found.append(
                Parameter(
                    name=name,
                    shape=tuple(tensor.shape),
                    trained=name in self._trained,
                    buffer=not isinstance(tensor, nn.Parameter),
                    dtype=tensor.dtype,
                    axis=own,
                    input_axis=of_input,
                )
            )
        return tuple(found)

    def _may_write(self, node: Node) -> bool:
        packet = node.in_place.split(".")[1] if node.in_place else ""
        if packet not in _WRITTEN or node.form is None or not isinstance(node.args[0], Value):
            return False
        return node.args[0].name in self._varying and self._forms[node.args[0].name] == node.form

    def _flops(self, node: Node) -> int:
        """Two per multiply-add: each output position takes one product with a kernel."""
        if (node.operator not in CONVOLUTIONS and node.operator != "linear") or node.form is None:
            return 0
        operands = operands_of(node, self._forms, self._weights)
        if len(operands) < 2:
            return 0
        transposed = CONVOLUTIONS.get(node.operator, False)
        weight = _integers(operands[1].form.shape)
        over = operands[0].form if transposed else node.form
        per_image = math.prod(one.times if isinstance(one, Images) else one for one in over.shape)
        return 2 * per_image * math.prod(weight[1:])

    def _renamed(self, leaf: Any) -> Any:
        return Value(self._names[leaf.name]) if isinstance(leaf, Value) else leaf

    def _in_names(self, node: Node) -> Node:
        """A call with the names of operations where it takes or is one."""

        def one(leaf: Any) -> Any:
            return Value(self._name_of(leaf.name)) if isinstance(leaf, Value) else leaf

        return replace(node.mapped(one), name=self._name_of(node.name))

    def _name_of(self, name: str) -> str:
        """Of an operation its name; of a call that operations make for themselves one that no operation has."""
        return self._names[name] if self._is_operation(name) else f"own {name}"


def _integers(extents: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(one) for one in extents)


def _values(structure: Any) -> list[str]:
    return [one.name for one in leaves(structure) if isinstance(one, Value)]


def _state(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
