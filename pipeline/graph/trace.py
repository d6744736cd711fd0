"""A model as a list of operations, each with its inputs, its output shape and its effect on layouts."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from pipeline.errors import InputError
from pipeline.graph.effects import Effect, effect_of


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter or buffer of an operation."""

    name: str
    """Qualified name in the model, e.g. ``conv1.weight``."""
    shape: tuple[int, ...]
    trained: bool
    """Whether it gets a gradient; never for buffers."""
    buffer: bool


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One node of the traced model."""

    name: str
    effect: Effect
    module: str | None
    """Qualified name of the submodule it calls."""
    inputs: tuple[str, ...]
    """Names of the operations whose output it takes; ``graph.input`` is the batch."""
    shape: tuple[int, ...] | None
    """Shape of its output for one image, ``(C, H, W)`` or ``(C,)``; None where the output is not a tensor of images."""
    parameters: tuple[Parameter, ...]
    flops_per_image: int
    """Floating-point operations of the forward pass for one image; 0 for anything but convolutions and dense layers."""
    convolution: bool

    @property
    def channels(self) -> int:
        """Channels (features after flatten) of the output."""
        return self.shape[0] if self.shape else 0


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The operations of a model in the order they run."""

    input: str
    input_shape: tuple[int, ...]
    """Shape of one image, ``(C, H, W)``."""
    operations: tuple[Operation, ...]
    output: str

    def __getitem__(self, name: str) -> Operation:
        for operation in self.operations:
            if operation.name == name:
                return operation
        raise KeyError(name)

    @property
    def convolutions(self) -> tuple[Operation, ...]:
        """The operations that are convolutions."""
        return tuple(operation for operation in self.operations if operation.convolution)

    def shape_of(self, value: str) -> tuple[int, ...] | None:
        """Shape for one image of an operation's output or of the batch."""
        return self.input_shape if value == self.input else self[value].shape


class _Whole(nn.Module):
    """A model that cannot be traced, as a single operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(self.root, _Whole) or super().is_leaf_module(module, qualified_name)


def traced(model: nn.Module) -> fx.GraphModule:
    """The model as an ``fx.GraphModule`` over its own submodules (shared, not copied).

    A model whose control flow depends on data cannot be traced and becomes one operation.
    """
    own = set(vars(model))
    try:
        graph = _Tracer().trace(model)
        for node in graph.nodes:
            if node.kwargs.get("inplace"):
                # A segment's input is a leaf of its own, which must not be written to.
                node.kwargs = {**node.kwargs, "inplace": False}
        return fx.GraphModule(model, graph)
    except Exception:  # noqa: BLE001 - fx fails in as many ways as there are models; all mean "keep it whole"
        whole = _Whole(model)
        return fx.GraphModule(whole, _Tracer().trace(whole))
    finally:
        # The tracer leaves constants on the model, under other names each time; the graph has its own.
        for name in set(vars(model)) - own:
            delattr(model, name)


def trace(model: nn.Module, example_input: torch.Tensor) -> Graph:
    """Trace ``model`` and give every operation its shapes for images like ``example_input`` (``(B, C, H, W)``, B >= 1).

    Runs on the meta device where the model allows it, and on a copy: the model is left as it was. Raises ``InputError``
    if the model does not take such images.
    """
    graph_module = traced(model)
    nodes = list(graph_module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    results = _shapes(graph_module, example_input)
    images = example_input.shape[0]
    calls: dict[str, int] = {}
    for node in nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    owners = _owners(graph_module)
    operations = []
    for node in nodes:
        if node.op in ("placeholder", "output"):
            continue
        module = graph_module.get_submodule(node.target) if node.op == "call_module" else None
        shape = _image_shape(results.get(node.name), images)
        effect = effect_of(node, module) if shape is not None else Effect.WHOLE
        if isinstance(module, nn.Linear) and len(shape or ()) != 1:
            effect = Effect.WHOLE  # over sequences the channels of a dense layer are not dimension 1
        parameters = _parameters(module, node.target) if module is not None else _attribute(graph_module, node)
        if module is not None and (calls[node.target] > 1 or any(owners[id(t)] > 1 for t in _state(module))):
            effect = Effect.WHOLE  # used twice or tied: one copy of the weights must see all gradients
        if effect is Effect.CHANNELWISE and not _same_shape_inputs(node, results):
            effect = Effect.WHOLE
        operations.append(
            Operation(
                name=node.name,
                effect=effect,
                module=str(node.target) if module is not None else None,
                inputs=tuple(argument.name for argument in node.all_input_nodes),
                shape=shape,
                parameters=parameters,
                flops_per_image=_flops(module, shape),
                convolution=isinstance(module, nn.modules.conv._ConvNd),
            )
        )
    output = nodes[-1].args[0]
    if len(placeholders) != 1 or not isinstance(output, fx.Node):
        raise InputError(
            f"{type(model).__name__}.forward takes {len(placeholders)} inputs and returns {type(output).__name__}: "
            "a model must take one batch of images and return one tensor"
        )
    return Graph(
        input=placeholders[0].name,
        input_shape=tuple(example_input.shape[1:]),
        operations=tuple(operations),
        output=output.name,
    )


def _shapes(graph_module: fx.GraphModule, example_input: torch.Tensor) -> dict[str, Any]:
    """The result of every node, on the meta device; by real arithmetic only where the model looks at its data."""
    dtype = next((p.dtype for p in graph_module.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())
    x_BCHW = example_input.to(dtype)
    try:
        return _results(copy.deepcopy(graph_module).to("meta"), x_BCHW.to("meta"))
    except Exception:  # noqa: BLE001 - whatever the model's own code raises
        try:
            return _results(copy.deepcopy(graph_module).cpu(), x_BCHW.cpu())
        except Exception as error:
            shape = tuple(example_input.shape[1:])
            raise InputError(
                f"the model does not take images of shape {shape} (C, H, W): {_last_line(error)}"
            ) from error


def _results(graph_module: fx.GraphModule, x_BCHW: torch.Tensor) -> dict[str, Any]:
    results: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            results[n.name] = super().run_node(n)
            return results[n.name]

    with torch.no_grad():
        Recorder(graph_module).run(x_BCHW)
    return results


def _last_line(error: Exception) -> str:
    """The first line of the error itself, without fx's account of the node."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _image_shape(result: Any, images: int) -> tuple[int, ...] | None:
    is_batch = isinstance(result, torch.Tensor) and result.dim() >= 2 and result.shape[0] == images
    return tuple(result.shape[1:]) if is_batch else None


def _same_shape_inputs(node: fx.Node, results: dict[str, Any]) -> bool:
    """Whether all tensor inputs have one shape, so that one split serves them all; false if one is no tensor."""
    inputs = [results.get(argument.name) for argument in node.all_input_nodes]
    kinds = {(one.shape, one.dtype) if isinstance(one, torch.Tensor) else None for one in inputs}
    own = results.get(node.name)
    if len(kinds) != 1 or None in kinds or not isinstance(own, torch.Tensor):
        return False
    # Only numbers of the model's own type travel: a comparison, for one, gives truth values.
    return bool(own.is_floating_point() and own.dtype == results[node.all_input_nodes[0].name].dtype)


def _state(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _owners(model: nn.Module) -> dict[int, int]:
    """How many submodules own each parameter or buffer: more than one means tied."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            owners[id(tensor)] = owners.get(id(tensor), 0) + 1
    return owners


def _parameters(module: nn.Module, prefix: str) -> tuple[Parameter, ...]:
    found = [
        Parameter(name=f"{prefix}.{name}", shape=tuple(p.shape), trained=p.requires_grad, buffer=False)
        for name, p in module.named_parameters()
    ]
    found += [
        Parameter(name=f"{prefix}.{name}", shape=tuple(b.shape), trained=False, buffer=True)
        for name, b in module.named_buffers()
    ]
    return tuple(found)


def _attribute(root: nn.Module, node: fx.Node) -> tuple[Parameter, ...]:
    """The parameter or buffer that the model's own forward reads, if ``node`` does that."""
    if node.op != "get_attr":
        return ()
    owner, _, leaf = str(node.target).rpartition(".")
    tensor = getattr(root.get_submodule(owner), leaf)
    trained, buffer = tensor.requires_grad, not isinstance(tensor, nn.Parameter)
    return (Parameter(name=str(node.target), shape=tuple(tensor.shape), trained=trained, buffer=buffer),)


def _flops(module: nn.Module | None, shape: tuple[int, ...] | None) -> int:
    """Two per multiply-add: each output position takes one product with a kernel."""
    if shape is None or not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        return 0
    return 2 * math.prod(shape) * (module.weight.numel() // shape[0])
