"""From captured calls to operations: what leads to each from weights and sizes, and what each does to a layout."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipeline.graph.axes import Axes, Operand, Shapes, kept_axes, operands_of
from pipeline.graph.capture import Captured
from pipeline.graph.check import Facts
from pipeline.graph.copies import tensors_of
from pipeline.graph.effects import Effect
from pipeline.graph.nodes import INPUT, Form, Images, Node, Value, Weight, leaves, mapped
from pipeline.graph.operations import Cut, Graph, Noise, Operation, Parameter

_CONVOLUTIONS = {
    f"conv{transposed}{axes}d": bool(transposed) for transposed in ("", "_transpose") for axes in (1, 2, 3)
}
"""By the name of the operator, whether the convolution is transposed."""
_DROPOUTS = {
    "dropout": ("element", False), "feature_dropout": ("channel", False), "alpha_dropout": ("element", True),
    "feature_alpha_dropout": ("channel", True),
}  # fmt: skip
"""By the name of the operator, what one draw decides, and whether it is alpha dropout."""
_FILLS = ("bernoulli_", "uniform_", "normal_", "exponential_", "rand", "randn", "randint", "randperm")
"""Random numbers of which every rank can draw all and take its part."""
_WRITTEN = (
    "relu_", "relu6_", "leaky_relu_", "elu_", "celu_", "selu_", "silu_", "mish_", "hardswish_", "hardtanh_",
    "hardsigmoid_", "threshold_", "add_",
)  # fmt: skip
"""Operators that a run lets write to their first argument where the model's own code does."""
_INDEXING = ("max_pool", "adaptive_max_pool", "fractional_max_pool")


@dataclass(frozen=True)
class _Place:
    """Where the images and the channels are in a value."""

    images: int | None
    """Axis of the images; None if it has none, or mixes them."""
    per_image: int
    """Entries along it for each image."""
    channels: int
    travels: bool
    """Whether layouts suit it: images along axis 0, one entry each, and at least one more axis."""


_NOWHERE = _Place(None, 0, 1, travels=False)


@dataclass(frozen=True)
class _Judgement:
    """What is known of one call."""

    effect: Effect
    place: _Place
    unit: int = 1
    input_unit: int = 1
    noise: Noise | None = None
    cuts: Mapping[str, Cut] | None = None
    axes: Mapping[str, tuple[int | None, int | None]] | None = None
    """By weight that is taken as it is, the axes that go with the output's and the input's channels."""


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
        self._places: dict[str, _Place] = {}
        self._names = _Names(model, captured)
        self._counters = self._batch_counters()
        written = {name for node in captured.nodes if node.name not in self._counters for name in node.writes}
        self._varying, self._touched = self._dependence(written)
        self._drawing = [node for node in captured.nodes if node.name in facts.drawing]
        self._in_order = any(self._is_unpredictable(node) for node in self._drawing)
        """Whether random numbers have to be drawn as the calls come, by one device."""
        self._sources = {node.name for node in self._drawing if node.name not in self._varying and not self._in_order}
        self._useful = self._differentiable()

    def graph(self) -> Graph:
        """All operations in order."""
        captured = self._captured
        first, *others = captured.inputs
        for name, form in zip(captured.inputs, captured.forms, strict=True):
            self._places[name] = _place_of(form)
        operations = [
            self._input(name, form, key)
            for name, form, key in zip(others, captured.forms[1:], self._keys[1:], strict=True)
        ]
        returned = {one.name for one in leaves(captured.returned) if isinstance(one, Value)}
        for node in captured.nodes:
            if node.name in self._counters:
                continue
            alone = node.name not in self._varying and node.name not in self._touched
            draws = node.name in self._drawn_names() and self._in_order
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

    def _drawn_names(self) -> set[str]:
        return {node.name for node in self._drawing}

    def _input(self, name: str, form: Form, key: int | str) -> Operation:
        node = Node(
            name=name, target=INPUT, args=(key,), kwargs={}, module="", results=(form,), is_tensor=True
        )  # fmt: skip
        self._nodes[name] = node
        return self._made(node, [], _Judgement(Effect.WHOLE, _place_of(form)))

    def _operation(self, node: Node) -> Operation:
        judgement = self._judged(node)
        self._places[node.name] = judgement.place
        before = self._closure([node])[:-1]
        if node.operator == "batch_norm":
            before += [self._nodes[name] for name, module in self._counters.items() if module == node.name]
        return self._made(node, before, judgement)

    def _made(self, node: Node, before: Sequence[Node], judgement: _Judgement) -> Operation:
        place, form = judgement.place, node.form
        shape = _integers(form.shape[1:]) if place.travels and form is not None else None
        nodes = tuple(self._in_names(one) for one in (*before, node))
        taken = dict.fromkeys(
            name for one in (*before, node) for name in one.values if name in self._varying or self._is_operation(name)
        )
        inputs = tuple(self._names[name] for name in taken)
        convolution = node.operator in _CONVOLUTIONS
        return Operation(
            name=self._names[node.name],
            effect=judgement.effect,
            nodes=nodes,
            call=_described((*before, node), self._model),
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
        for name, tensor in self._tensors.items():
            forms[name] = Form(tuple(tensor.shape), tensor.dtype, tuple(range(tensor.dim())))
        return forms

    def _batch_counters(self) -> dict[str, str]:
        """The calls that count the batches of a BatchNorm, by name, with the call of that BatchNorm."""
        found = {}
        normalisations = [node for node in self._captured.nodes if node.operator == "batch_norm"]
        used = {name for node in self._captured.nodes for name in node.values}
        for node in self._captured.nodes:
            if not node.writes or not node.writes[0].endswith("num_batches_tracked") or node.values:
                continue
            after = self._captured.nodes[self._captured.nodes.index(node) :]
            mine = next((one for one in after if one in normalisations and one.module == node.module), None)
            if mine is not None and node.name not in used:
                found[node.name] = mine.name
        return found

    def _dependence(self, written: set[str]) -> tuple[set[str], set[str]]:
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
        return varying, touched

    def _is_unpredictable(self, node: Node) -> bool:
        if node.name in self._touched or node.submodule is not None or node.autocast is not None:
            return True
        if node.name not in self._varying:
            return node.operator not in _FILLS
        return node.operator not in _DROPOUTS or len(node.values) != 1

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

    # What a call does to a layout.

    def _judged(self, node: Node) -> _Judgement:
        whole = _Judgement(Effect.WHOLE, self._place_of_whole(node))
        if node.submodule is not None or node.autocast is not None or node.writes or not node.results:
            return whole
        if node.name not in self._varying or any(name in self._touched for name in node.values):
            return whole
        if any(name in self._written_weights() for name in node.weights):
            return whole
        if node.name in self._drawn_names() and self._in_order:
            return whole
        if node.target == "getitem":
            return self._item(node)
        operands = operands_of(node, self._forms)
        call = Shapes(node, operands, node.results[0])
        kept = kept_axes(call)
        if kept is None:
            return whole
        if node.operator == "batch_norm" and node.argument("training"):
            return self._batch_norm(call) or whole
        images = self._images_of(call, kept)
        if images is None:
            return whole
        if node.operator in _CONVOLUTIONS or node.operator == "linear":
            return self._kernel(call, images)
        return self._by_channels(call, kept, images)

    def _written_weights(self) -> set[str]:
        return {name for node in self._captured.nodes if node.name not in self._counters for name in node.writes}

    def _place_of_whole(self, node: Node) -> _Place:
        return _place_of(node.form) if node.form is not None else _NOWHERE

    def _item(self, node: Node) -> _Judgement:
        """One of several results."""
        source = self._nodes.get(node.values[0])
        place = self._places[node.values[0]]
        if source is None or place.images is None or node.form is None:
            return _Judgement(Effect.WHOLE, self._place_of_whole(node))
        return _Judgement(Effect.IMAGEWISE, self._placed(node.form, place.images, place.per_image, place.channels))

    def _images_of(self, call: Shapes, kept: Sequence[Axes]) -> tuple[int, int] | None:
        """The axis of the images in the result, and its entries for each; None where images are mixed."""
        found: set[tuple[int, int]] = set()
        for operand, axes in zip(call.operands, kept, strict=True):
            if operand.name not in self._varying:
                continue
            place = self._places[operand.name]
            axis = None if place.images is None else axes.get(place.images)
            if axis is None:
                return None
            extent = call.result.shape[axis]
            if (
                not isinstance(extent, Images)
                or extent.plus
                or sum(isinstance(e, Images) for e in call.result.shape) > 1
            ):
                return None
            same = extent == operand.form.shape[place.images]  # type: ignore[index]
            if not same and call.node.operator not in _VIEWS:
                return None
            found.add((axis, extent.times))
        if len(found) != 1:
            return None
        (image,) = found
        for operand, axes in zip(call.operands, kept, strict=True):
            # What is made of sizes may be as long as there are images, but then along that axis.
            long = [axis for axis, extent in enumerate(operand.form.shape) if isinstance(extent, Images)]
            if operand.name not in self._varying and any(axes.get(axis) != image[0] for axis in long):
                return None
        return image

    def _kernel(self, call: Shapes, images: tuple[int, int]) -> _Judgement:
        node = call.node
        source = call.operands[0]
        place = self._places[source.name]
        linear = node.operator == "linear"
        axis = len(call.result.shape) - 1 if linear else 1
        target = self._placed(call.result, *images, axis)
        imagewise = _Judgement(Effect.IMAGEWISE, target)
        alone = [one.name for one in call.operands if one.name in self._varying] == [source.name]
        if not alone or not place.travels or not target.travels or place.channels != axis:
            return imagewise
        transposed, groups = _CONVOLUTIONS.get(node.operator, False), int(node.argument("groups", 1))
        width = int(call.result.shape[axis])  # type: ignore[arg-type]
        inside = int(source.form.shape[axis])  # type: ignore[arg-type]
        if groups > 1 and transposed and width != inside:
            return imagewise
        rows: tuple[int | None, int | None] = (1, 0) if transposed and groups == 1 else (0, 1)
        if groups > 1:
            rows = (0, None)  # both axes of a group's weights belong to the group
        axes: dict[str, tuple[int | None, int | None]] = {}
        cuts = {}
        for operand, (own, of_input) in zip(call.operands[1:], (rows, (0, None)), strict=False):
            if operand.name in self._tensors:
                axes[operand.name] = (own, of_input)
            else:
                cuts[f"own {operand.name}"] = Cut(channels=own, inputs=of_input)
        return _Judgement(
            Effect.KERNEL if groups == 1 else Effect.GROUPED,
            target,
            unit=1 if groups == 1 else width // groups,
            input_unit=1 if groups == 1 else inside // groups,
            cuts=cuts,
            axes=axes,
        )

    def _batch_norm(self, call: Shapes) -> _Judgement | None:
        source, *others = call.operands
        place = self._places[source.name]
        if not place.travels or place.channels != 1 or any(one.name not in self._tensors for one in others):
            return None
        if call.node.argument("running_mean") is not None and not isinstance(call.node.argument("momentum"), float):
            return None
        axes: dict[str, tuple[int | None, int | None]] = {one.name: (0, None) for one in others}
        return _Judgement(Effect.BATCHNORM, place, axes=axes)

    def _by_channels(self, call: Shapes, kept: Sequence[Axes], images: tuple[int, int]) -> _Judgement:
        """What treats images by themselves: does it treat channels so, too?"""
        node = call.node
        varying = [
            (operand, axes, self._places[operand.name])
            for operand, axes in zip(call.operands, kept, strict=True)
            if operand.name in self._varying
        ]
        ends = {axes.get(place.channels) for _, axes, place in varying}
        axis = next(iter(ends)) if len(ends) == 1 else None
        target = self._placed(call.result, *images, axis if axis is not None else self._likely(varying))
        cuts = self._cuts(call, kept, images[0], None)
        noise = self._noise(node, target)
        imagewise = _Judgement(Effect.IMAGEWISE, target, noise=noise, cuts=cuts)
        if not target.travels or not all(place.travels for _, _, place in varying) or not node.is_tensor:
            return imagewise
        if self._is_flattening(call, varying):
            return _Judgement(Effect.FLATTEN, replace(target, channels=1))
        if node.operator == "group_norm" and varying[0][2].channels == 1:
            width = int(call.result.shape[1]) // int(node.argument("num_groups"))  # type: ignore[arg-type]
            axes: dict[str, tuple[int | None, int | None]] = {
                one.name: (0, None) for one in call.operands[1:] if one.name in self._tensors
            }
            if len(axes) < len(call.operands) - 1:
                return imagewise
            return _Judgement(Effect.CHANNELWISE, replace(target, channels=1), unit=width, input_unit=width, axes=axes)
        if axis is None or axis == images[0]:
            return imagewise
        extent = call.result.shape[axis]
        if any(operand.form.shape[place.channels] != extent for operand, _, place in varying):
            return imagewise
        if noise is not None and noise.per == "channel" and axis != 1:
            return imagewise
        if node.operator in ("new_zeros", "repeat") or (node.operator in _SIZED and not node.is_tensor):
            return imagewise
        own = {}
        for operand, axes_kept in zip(call.operands, kept, strict=True):
            if operand.name in self._tensors:
                along = [mine for mine, place in axes_kept.items() if place == axis]
                whole = operand.form.shape[along[0]] == extent if along else False
                own[operand.name] = (along[0] if along and whole and extent != 1 else None, None)
        cuts = self._cuts(call, kept, images[0], axis)
        return _Judgement(Effect.CHANNELWISE, target, noise=noise, cuts=cuts, axes=own)

    def _cuts(self, call: Shapes, kept: Sequence[Axes], images: int, channels: int | None) -> dict[str, Cut]:
        """How what is made of weights and sizes alone is cut, where it is as long as the result."""
        found = {}
        for operand, axes in zip(call.operands, kept, strict=True):
            if operand.name in self._varying or operand.name in self._tensors:
                continue
            along_images = next((mine for mine, place in axes.items() if place == images), None)
            if along_images is not None and not isinstance(operand.form.shape[along_images], Images):
                along_images = None
            along = next((mine for mine, place in axes.items() if channels is not None and place == channels), None)
            if along is not None and operand.form.shape[along] == 1:
                along = None
            found[f"own {operand.name}"] = Cut(images=along_images, channels=along)
        return found

    def _likely(self, varying: Sequence[tuple[Operand, Axes, _Place]]) -> int:
        """The axis to take for the channels where they are mixed: where they would have been, or axis 1."""
        ends = (axes.get(place.channels) for _, axes, place in varying)
        return next((axis for axis in ends if axis), 1)

    def _is_flattening(self, call: Shapes, varying: Sequence[tuple[Operand, Axes, _Place]]) -> bool:
        """``(B, C, H, W)`` to ``(B, C * H * W)``."""
        if call.node.operator not in ("view", "reshape", "flatten", "_unsafe_view") or len(call.result.shape) != 2:
            return False
        operand, _, place = varying[0]
        shape = operand.form.shape
        return place.channels == 1 and math.prod(_integers(shape[1:])) == call.result.shape[1] != shape[1]

    def _noise(self, node: Node, target: _Place) -> Noise | None:
        if node.operator not in _DROPOUTS or node.name not in self._drawn_names():
            return None
        per, alpha = _DROPOUTS[node.operator]
        form = self._forms[node.values[0]]
        folded: tuple[int, ...] = ()
        if not target.travels:
            folded = tuple(one.times if isinstance(one, Images) else one for one in form.shape)
        order = form.order if per == "element" else ()
        return Noise(per, float(node.argument("p")), alpha=alpha, order=order, folded=folded)

    def _placed(self, form: Form, images: int, per_image: int, channels: int) -> _Place:
        travels = images == 0 and per_image == 1 and len(form.shape) >= 2
        return _Place(images, per_image, channels if len(form.shape) > channels else 1, travels=travels)

    # What an operation has of the model.

    def _parameters(self, nodes: Sequence[Node], judgement: _Judgement) -> tuple[Parameter, ...]:
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
        if (node.operator not in _CONVOLUTIONS and node.operator != "linear") or node.form is None:
            return 0
        operands = operands_of(node, self._forms)
        if len(operands) < 2:
            return 0
        transposed = _CONVOLUTIONS.get(node.operator, False)
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


_VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "ravel")
_SIZED = ("expand", "repeat")


class _Names:
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


_LAYERS = {*_CONVOLUTIONS, "linear", "batch_norm", "group_norm", "layer_norm", "instance_norm", "prelu", "embedding"}


def _identifier(path: str) -> str:
    name = path.replace(".", "_")
    return f"_{name}" if name[:1].isdigit() else name


def _place_of(form: Form) -> _Place:
    """Of an input, or of what one device makes of all images."""
    first = form.shape[0] if form.shape else None
    rest = all(not isinstance(one, Images) for one in form.shape[1:])
    if first == Images(1) and rest and len(form.shape) >= 2:
        return _Place(0, 1, 1, travels=True)
    return _NOWHERE


def _integers(extents: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(one) for one in extents)


def _values(structure: Any) -> list[str]:
    return [one.name for one in leaves(structure) if isinstance(one, Value)]


def _state(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _described(nodes: Sequence[Node], model: nn.Module) -> str:
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
