"""A model as a list of operations, each with its inputs, its output shape and its effect on layouts."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pipeline.errors import InputError, first_line
from pipeline.graph.effects import RANDOM_FUNCTIONS, Effect, random_kind
from pipeline.graph.rules import WHOLE, Call, Judgement, Noise, aligned_axis, judge
from pipeline.graph.tracing import EVALUATION, TRAINING, traced
from pipeline.graph.writes import IN_PLACE, NO_GRADIENT

_TRIALS = (3, 5)
"""Two numbers of images: what has as many entries along axis 0 for both is a tensor of images."""
_RATE = re.compile(r"-?(?:\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]\d+)")
"""A number that is not whole."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter or buffer of an operation."""

    name: str
    """Qualified name in the model, e.g. ``conv1.weight``."""
    shape: tuple[int, ...]
    trained: bool
    """Whether it gets a gradient: never for buffers, nor where none flows to it."""
    buffer: bool
    axis: int | None = None
    """The axis that goes with the output's channels; None if it is the same for all of them."""
    input_axis: int | None = None
    """The axis that goes with the input's channels."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One node of the traced model."""

    name: str
    effect: Effect
    module: str | None
    """Qualified name of the submodule it calls."""
    call: str
    """What it calls, a function, a method or a type of module, with the arguments that are no tensors."""
    inputs: tuple[str, ...]
    """Names of the operations whose output it takes; ``graph.input`` is the batch."""
    shape: tuple[int, ...] | None
    """Shape of its output for one image, ``(C, H, W)`` or ``(C,)``; None where the output is not a tensor of images."""
    channel_axis: int
    """Axis of the channels in its output, counting the images' as 0."""
    unit: int
    """How many adjacent output channels stay together: the width of a group."""
    input_unit: int
    """The same for its input."""
    noise: Noise | None
    """What a random operation multiplies its input by."""
    keeps_indices: bool
    """Whether it keeps, for the backward pass, where each of its outputs came from, as max pooling does."""
    in_place: bool
    """Whether the model's own code lets this activation or sum write to its first input."""
    parameters: tuple[Parameter, ...]
    differentiable: bool
    """Whether a gradient flows through its output to something that is trained."""
    flops_per_image: int
    """Floating-point operations of the forward pass for one image; 0 for anything but convolutions and dense layers."""
    convolution: bool

    @property
    def channels(self) -> int:
        """Channels (features after flatten) of the output."""
        return self.shape[self.channel_axis - 1] if self.shape else 0


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The operations of a model in the order they run."""

    input: str
    input_shape: tuple[int, ...]
    """Shape of one image, ``(C, H, W)``."""
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]
    """What the model returns: most often one, with auxiliary heads several."""
    evaluable: bool
    """Whether evaluation mode runs the same operations as training."""

    _by_name: Mapping[str, Operation] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {operation.name: operation for operation in self.operations})

    def __getitem__(self, name: str) -> Operation:
        return self._by_name[name]

    @cached_property
    def digest(self) -> str:
        """A short text, the same in any process, that another network has not, nor one with other sizes or arguments.

        Neither the values of weights nor rates and slopes, such as dropout's, are in it: no time depends on them.
        """
        return self._hashed(frozen=True)

    @cached_property
    def plan_digest(self) -> str:
        """The same as if all weights were trained: a plan can be run whichever are."""
        return self._hashed(frozen=False)

    def _hashed(self, *, frozen: bool) -> str:
        """The digest, with or without what is frozen."""
        told: list[object] = [self.input_shape, self.outputs]
        for one in self.operations:
            taken = ["" if value == self.input else value for value in one.inputs]
            call = one.effect.value, _RATE.sub("_", one.call), one.noise and one.noise.per
            state = [
                (each.name, each.shape, each.trained if frozen else not each.buffer, each.buffer)
                for each in one.parameters
            ]
            told.append((one.name, *call, taken, one.shape, one.channel_axis, one.unit, one.input_unit, state))
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    @property
    def convolutions(self) -> tuple[Operation, ...]:
        """The operations that are convolutions."""
        return tuple(operation for operation in self.operations if operation.convolution)

    def shape_of(self, value: str) -> tuple[int, ...] | None:
        """Shape for one image of an operation's output or of the batch."""
        return self.input_shape if value == self.input else self[value].shape

    def channels_of(self, value: str) -> int:
        """Channels of an operation's output or of the batch."""
        return self.input_shape[0] if value == self.input else self[value].channels

    def channel_axis_of(self, value: str) -> int:
        """Axis of the channels of an operation's output or of the batch."""
        return 1 if value == self.input else self[value].channel_axis


def trace(model: nn.Module, example_input: torch.Tensor) -> Graph:
    """Trace ``model`` and give every operation its shapes for images like ``example_input`` (``(B, C, H, W)``, B >= 1).

    Runs on the meta device where the model allows it, and on a copy: the model is left as it was. Raises ``InputError``
    if the model does not take such images.
    """
    graph_module = traced(model)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    required = [node for node in placeholders if not node.args]
    if len(required) != 1 or any(node.users for node in placeholders[1:]):
        raise InputError(
            f"{type(model).__name__}.forward takes {len(required)} inputs: it must take one batch of images"
        )
    return _Analysis(graph_module, example_input, type(model).__name__).graph()


class _Analysis:
    """From a traced model and the results of its nodes to its operations."""

    def __init__(self, graph_module: fx.GraphModule, example_input: torch.Tensor, name: str) -> None:
        self._model, self._name = graph_module, name
        self._input_shape = tuple(example_input.shape[1:])
        self._dtype = model_dtype(graph_module)
        self._trials, self._images = _results(graph_module, example_input.to(self._dtype))
        self._in_memory = _in_memory(graph_module, example_input.to(self._dtype), self._trials[0])
        self._axes: dict[str, int] = {}
        self._uses = _uses(graph_module)
        self._differentiable = _differentiable(graph_module, self._trials[0])
        self._trained = _trained(graph_module, self._differentiable)

    def graph(self) -> Graph:
        nodes = list(self._model.graph.nodes)
        source = next(node for node in nodes if node.op == "placeholder")
        self._axes[source.name] = 1
        operations = [self._operation(node) for node in nodes if node.op.startswith("call_")]
        outputs: list[str] = []
        fx.map_arg(nodes[-1].args[0], lambda node: outputs.append(node.name))
        if not outputs:
            raise InputError(f"{self._name}.forward returns nothing that depends on its input")
        return Graph(
            input=source.name,
            input_shape=self._input_shape,
            operations=tuple(operations),
            outputs=tuple(dict.fromkeys(outputs)),
            evaluable=bool(self._model.meta.get(EVALUATION, True)),
        )

    def _operation(self, node: fx.Node) -> Operation:
        module = self._model.get_submodule(str(node.target)) if node.op == "call_module" else None
        reads = [one for one in node.all_input_nodes if one.op == "get_attr"]
        taken = [one for one in node.all_input_nodes if one.op != "get_attr"]
        result = self._trials[0].get(node.name)
        call = Call(
            node=node,
            module=module,
            result=result,
            inputs={one.name: self._trials[0].get(one.name) for one in taken},
            axes={one.name: self._axes[one.name] for one in taken},
            parameters=[_attribute(self._model, str(one.target)) for one in reads],
            order=_memory_order(self._in_memory.get(node.name)),
            training=node.meta.get(TRAINING, True),
            is_images=self._is_images,
        )
        judgement = self._judged(call)
        shape = tuple(result.shape[1:]) if result is not None and self._is_images_of(node.name) else None
        axis = judgement.channel_axis if shape and judgement.channel_axis <= len(shape) else 1
        self._axes[node.name] = axis
        if judgement.effect is Effect.FLATTEN:
            taken = [one for one in taken if isinstance(call.inputs[one.name], torch.Tensor)]
        parameters = self._of_module(module, judgement, call) if module is not None else ()
        return Operation(
            name=node.name,
            effect=judgement.effect,
            module=str(node.target) if module is not None else None,
            call=_call_of(node, module),
            inputs=tuple(one.name for one in taken),
            shape=shape,
            channel_axis=axis,
            unit=judgement.unit,
            input_unit=judgement.input_unit,
            noise=judgement.noise,
            keeps_indices=_keeps_indices(node, module),
            in_place=bool(node.meta.get(IN_PLACE)) and judgement.effect is Effect.CHANNELWISE,
            parameters=(*parameters, *self._read(reads, result, axis, judgement)),
            differentiable=node in self._differentiable,
            flops_per_image=_flops(module, call, self._images),
            convolution=isinstance(module, nn.modules.conv._ConvNd),
        )

    def _judged(self, call: Call) -> Judgement:
        state = _state(call.module) if call.module is not None else call.parameters
        if any(self._uses[id(tensor)] > 1 for tensor in state):
            return WHOLE  # used in several places: one copy must see all gradients
        return judge(call)

    def _is_images(self, value: Any) -> bool:
        """Whether a result of the first trial is a tensor of images."""
        name = next((name for name, one in self._trials[0].items() if one is value), None)
        return name is not None and self._is_images_of(name)

    def _is_images_of(self, name: str) -> bool:
        return all(
            isinstance(one, torch.Tensor) and one.dim() >= 2 and one.shape[0] == images and one.dtype == self._dtype
            for one, images in zip((trial.get(name) for trial in self._trials), self._images, strict=True)
        )

    def _read(self, reads: list[fx.Node], result: Any, axis: int, judgement: Judgement) -> tuple[Parameter, ...]:
        """What the model's own forward reads of its parameters and buffers for this call."""
        found = []
        for one in reads:
            tensor = _attribute(self._model, str(one.target))
            broadcast = judgement.effect is Effect.CHANNELWISE and isinstance(result, torch.Tensor)
            found.append(
                Parameter(
                    name=str(one.target),
                    shape=tuple(tensor.shape),
                    trained=id(tensor) in self._trained,
                    buffer=not isinstance(tensor, nn.Parameter),
                    axis=aligned_axis(tensor, result, axis) if broadcast else None,
                )
            )
        return tuple(found)

    def _of_module(self, module: nn.Module, judgement: Judgement, call: Call) -> tuple[Parameter, ...]:
        """The parameters and buffers of a module."""
        channels = call.result.shape[judgement.channel_axis] if judgement.effect is not Effect.WHOLE else 0
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        kernel = judgement.effect in (Effect.KERNEL, Effect.GROUPED)
        found = []
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            axis, input_axis = None, None
            if kernel and name == "weight":
                axis, input_axis = (1, 0) if transposed else (0, 1)
                if judgement.effect is Effect.GROUPED:
                    axis, input_axis = 0, None  # both axes of a group's weights belong to the group
            elif tensor.dim() and tensor.shape[0] == channels:
                axis = 0
            found.append(
                Parameter(
                    name=f"{call.node.target}.{name}",
                    shape=tuple(tensor.shape),
                    trained=id(tensor) in self._trained,
                    buffer=not isinstance(tensor, nn.Parameter),
                    axis=axis,
                    input_axis=input_axis,
                )
            )
        return tuple(found)


def _keeps_indices(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return isinstance(module, nn.modules.pooling._MaxPoolNd | nn.modules.pooling._AdaptiveMaxPoolNd)
    return "max_pool" in getattr(node.target, "__name__", str(node.target))


def _call_of(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return f"{type(module).__qualname__} {_description(module)}"
    target = getattr(node.target, "__name__", str(node.target))
    args, kwargs = (fx.map_arg(given, lambda _: "_") for given in (node.args, node.kwargs))
    return f"{target}{args}{kwargs}"


def _description(module: nn.Module) -> str:
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


def model_dtype(model: nn.Module) -> torch.dtype:
    """The number type of a model: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())


def _results(graph_module: fx.GraphModule, example_BCHW: torch.Tensor) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """The result of every node for some numbers of images, and these numbers.

    On the meta device, and by real arithmetic on the example only where the model looks at its data.
    """
    shape = example_BCHW.shape[1:]
    empty = copy.deepcopy(graph_module).to("meta")
    try:
        trials = [
            _run(empty, torch.empty(images, *shape, dtype=example_BCHW.dtype, device="meta")) for images in _TRIALS
        ]
    except Exception:  # noqa: BLE001 - whatever the model's own code raises
        try:
            x_BCHW = example_BCHW.cpu()
            repeated = [x_BCHW[[index % len(x_BCHW) for index in range(images)]] for images in _TRIALS]
            return [_really_run(graph_module, one) for one in repeated], _TRIALS
        except Exception as error:
            raise InputError(
                f"the model does not take images of shape {tuple(shape)} (C, H, W): {first_line(error)}"
            ) from error
    return trials, _TRIALS


def _run(graph_module: fx.GraphModule, x_BCHW: torch.Tensor) -> dict[str, Any]:
    results: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with torch.set_grad_enabled(not n.meta.get(NO_GRADIENT)):
                results[n.name] = super().run_node(n)
            return results[n.name]

    Recorder(graph_module.train()).run(x_BCHW)
    return results


def _really_run(graph_module: fx.GraphModule, x_BCHW: torch.Tensor) -> dict[str, Any]:
    """As ``_run``, by arithmetic on a copy; the random numbers to come are left as they were."""
    with torch.random.fork_rng(devices=[]):
        return _run(copy.deepcopy(graph_module).cpu(), x_BCHW.clone())


def _in_memory(graph_module: fx.GraphModule, example_BCHW: torch.Tensor, results: dict[str, Any]) -> dict[str, Any]:
    """Results whose strides are those that one device would meet, where masks are drawn in the order of memory.

    On the meta device convolutions forget the order of their input.
    """
    tensors = [*results.values(), *graph_module.parameters()]
    moved = any(isinstance(one, torch.Tensor) and not _is_in_order(one) for one in tensors)
    random = any(
        node.target in RANDOM_FUNCTIONS
        or (node.op == "call_module" and random_kind(graph_module.get_submodule(str(node.target))) is not None)
        for node in graph_module.graph.nodes
    )
    if not (moved and random) or any(one.is_meta for one in graph_module.parameters()):
        return results
    return _really_run(graph_module, example_BCHW.cpu())


def _is_in_order(tensor: torch.Tensor) -> bool:
    """Whether it is contiguous, also in the strides of axes with one entry, by which convolutions go."""
    return tensor.stride() == torch.empty(tensor.shape, device="meta").stride()


def _memory_order(result: Any) -> tuple[int, ...]:
    if not isinstance(result, torch.Tensor):
        return ()
    strides = result.stride()
    return tuple(sorted(range(result.dim()), key=lambda axis: -strides[axis]))


def _state(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _uses(graph_module: fx.GraphModule) -> Counter[int]:
    """By ``id``, in how many places each parameter or buffer is used; calls of one module count once."""
    uses: Counter[int] = Counter()
    for target in {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}:
        uses.update(id(tensor) for tensor in _state(graph_module.get_submodule(target)))
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            uses[id(_attribute(graph_module, str(node.target)))] += len(node.users)
    return uses


def _differentiable(graph_module: fx.GraphModule, results: Mapping[str, Any]) -> frozenset[fx.Node]:
    """The nodes through which a gradient flows, from what the model returns to something that is trained."""
    found: set[fx.Node] = set()
    for node in reversed(graph_module.graph.nodes):
        wanted = any(user.op == "output" or user in found for user in node.users)
        if wanted and node.op.startswith("call_") and _requires_gradient(results.get(node.name)):
            found.add(node)
    return frozenset(found)


def _requires_gradient(result: Any) -> bool:
    return any(isinstance(one, torch.Tensor) and one.requires_grad for one in _tensors(result))


def _tensors(result: Any) -> list[Any]:
    leaves = pytree.tree_leaves(result)
    return [part for leaf in leaves for part in (vars(leaf).values() if is_dataclass(leaf) else (leaf,))]


def _trained(graph_module: fx.GraphModule, differentiable: frozenset[fx.Node]) -> set[int]:
    """The ``id`` of the parameters that get a gradient."""
    found: list[torch.Tensor] = []
    for node in differentiable:
        if node.op == "call_module":
            found += graph_module.get_submodule(str(node.target)).parameters()
        found += [_attribute(graph_module, str(one.target)) for one in node.all_input_nodes if one.op == "get_attr"]
    return {id(tensor) for tensor in found if tensor.requires_grad}


def _attribute(root: nn.Module, target: str) -> torch.Tensor:
    owner, _, leaf = target.rpartition(".")
    return getattr(root.get_submodule(owner), leaf)  # type: ignore[no-any-return]


def _flops(module: nn.Module | None, call: Call, images: tuple[int, ...]) -> int:
    """Two per multiply-add: each output position takes one product with a kernel."""
    if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear) or not isinstance(call.result, torch.Tensor):
        return 0
    over = call.tensors[0] if isinstance(module, nn.modules.conv._ConvTransposeNd) else call.result
    # The sizes are asked for, not the weight: a parametrised one may change by being looked at.
    if isinstance(module, nn.Linear):
        products = module.in_features
    else:
        other = module.out_channels if over is not call.result else module.in_channels
        products = math.prod(module.kernel_size) * other // module.groups
    return 2 * (math.prod(over.shape) // images[0]) * products
