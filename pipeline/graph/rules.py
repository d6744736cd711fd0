"""From one traced call to its effect: the table, and the operations whose effect depends on their arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from pipeline.graph.effects import RANDOM_FUNCTIONS, TABLE, Effect, Scope, random_kind
from pipeline.graph.tracing import has_hooks
from pipeline.graph.writes import with_item


@dataclass(frozen=True)
class Noise:
    """What a random operation multiplies its input by."""

    per: str
    """``element``, ``channel`` or ``image``: what one draw decides; ``batch`` if one decides for all images."""
    p: float
    """Probability of dropping."""
    alpha: bool = False
    """Whether what is dropped is set to SELU's negative limit and the rest rescaled (alpha dropout)."""
    order: tuple[int, ...] = ()
    """For ``element``, the axes of the tensor from the outermost to the innermost in memory, in which it is drawn."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What is known of one operation."""

    effect: Effect
    channel_axis: int = 1
    """Axis of its output that holds the channels."""
    unit: int = 1
    """How many adjacent output channels cannot be parted."""
    input_unit: int = 1
    """The same for its input."""
    noise: Noise | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """One traced call with what it takes and gives, on shapes alone."""

    node: fx.Node
    module: nn.Module | None
    result: Any
    inputs: Mapping[str, Any]
    """By node, what it takes, parameters aside."""
    axes: Mapping[str, int]
    """By node, the axis of the channels."""
    parameters: Sequence[torch.Tensor]
    """What it reads of the model directly."""
    order: tuple[int, ...]
    """The axes of its result from the outermost to the innermost in memory."""
    training: bool
    """Whether its module is in training mode when the model is."""
    is_images: Callable[[Any], bool]
    """Whether a value is a tensor of images: batch first, of the model's own number type."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors it takes."""
        return [value for value in self.inputs.values() if isinstance(value, torch.Tensor)]

    def argument(self, name: str, position: int, default: Any = None) -> Any:
        """An argument by name or position, the tensor itself being at position 0."""
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        return self.node.args[position] if len(self.node.args) > position else default


WHOLE = Judgement(effect=Effect.WHOLE)


def judge(call: Call) -> Judgement:
    """The effect of one call."""
    if call.module is not None and has_hooks(call.module):
        return WHOLE
    random = _random(call)
    if random is not None:
        return random
    # Exact types: a subclass may override forward with anything.
    key: Any = type(call.module) if call.module is not None else call.node.target
    if key in TABLE:
        return _from_table(call, *TABLE[key])
    rule = None if call.module is not None and key is not nn.Flatten else _RULES.get(key)
    return rule(call) if rule is not None else WHOLE


def _from_table(call: Call, effect: Effect, scope: Scope) -> Judgement:
    if not call.tensors and effect is Effect.CHANNELWISE:
        return _look(call)  # arithmetic on shapes
    if effect is Effect.WHOLE or not call.is_images(call.result) or not _all_images(call):
        return WHOLE
    if effect is Effect.KERNEL:
        return _kernel(call)
    axes = {call.axes[name] for name, value in call.inputs.items() if isinstance(value, torch.Tensor)}
    if len(call.tensors) != len(call.inputs):
        return WHOLE  # a number computed from shapes: it may be of the local shape
    if effect is Effect.IMAGEWISE:
        same = len(axes) == 1 and call.tensors[0].shape == call.result.shape
        return _imagewise(call, axes.pop() if same else 1)
    if isinstance(call.module, nn.modules.instancenorm._InstanceNorm) and call.module.track_running_stats:
        return WHOLE  # its statistics are of all images
    if len(axes) != 1 or (scope is Scope.SECOND and axes != {1}):
        return WHOLE if effect is Effect.BATCHNORM else _imagewise(call)
    axis = axes.pop()
    if effect is Effect.BATCHNORM and not call.training and getattr(call.module, "running_mean", None) is not None:
        effect = Effect.CHANNELWISE  # it goes by what it knows, not by the batch
    if not _aligned(call, axis):
        return _imagewise(call)
    unit = 1
    if isinstance(call.module, nn.GroupNorm):
        unit = call.module.num_channels // call.module.num_groups
    return Judgement(effect=effect, channel_axis=axis, unit=unit, input_unit=unit)


def _kernel(call: Call) -> Judgement:
    module = call.module
    (source,) = call.tensors
    axis = next(iter(call.axes[name] for name in call.inputs))
    if isinstance(module, nn.Linear):
        last = source.dim() - 1
        return Judgement(effect=Effect.KERNEL if axis == last else Effect.IMAGEWISE, channel_axis=last)
    if not isinstance(module, nn.modules.conv._ConvNd) or source.dim() != module.weight.dim():
        return WHOLE
    if axis != 1:
        return _imagewise(call)
    if module.groups == 1:
        return Judgement(effect=Effect.KERNEL)
    if module.transposed and module.in_channels != module.out_channels:
        return _imagewise(call)
    return Judgement(
        effect=Effect.GROUPED,
        unit=module.out_channels // module.groups,
        input_unit=module.in_channels // module.groups,
    )


def _imagewise(call: Call, axis: int = 1) -> Judgement:
    """Any rank that has all channels can do it, provided that no tensor but those of images takes part."""
    own = all(_has_no_images(parameter, call) for parameter in call.parameters)
    return Judgement(effect=Effect.IMAGEWISE, channel_axis=axis) if own and _all_images(call) else WHOLE


def _all_images(call: Call) -> bool:
    return bool(call.tensors) and all(call.is_images(tensor) for tensor in call.tensors)


def _has_no_images(parameter: torch.Tensor, call: Call) -> bool:
    """Whether a parameter that is read directly is the same for every image."""
    dims = call.result.dim() if isinstance(call.result, torch.Tensor) else 0
    return parameter.dim() < dims or (parameter.dim() == dims and parameter.shape[0] == 1)


def _aligned(call: Call, axis: int) -> bool:
    """Whether channel ``k`` of the output comes from channel ``k`` of every tensor."""
    result = call.result
    same = all(one.dim() == result.dim() and one.shape[axis] == result.shape[axis] for one in call.tensors)
    if call.module is None and not call.parameters:
        return same
    if call.module is not None:
        return all(one.shape[axis] == result.shape[axis] for one in call.tensors)
    return same and all(_has_no_images(one, call) for one in call.parameters)


def aligned_axis(parameter: torch.Tensor, result: torch.Tensor, channel_axis: int) -> int | None:
    """The axis of a parameter that lies on the channels of a result it is broadcast to; None if it has only one."""
    axis = channel_axis - (result.dim() - parameter.dim())
    return axis if axis >= 0 and parameter.shape[axis] == result.shape[channel_axis] > 1 else None


def _random(call: Call) -> Judgement | None:
    kind = RANDOM_FUNCTIONS.get(call.node.target) if call.module is None else random_kind(call.module)
    if kind is None:
        return None
    if not call.is_images(call.result) or not _all_images(call) or len(call.inputs) != 1:
        return WHOLE
    if call.module is not None:
        p = float(str(call.module.p))
        training = call.training
        mode = getattr(call.module, "mode", "")
    else:
        p = call.argument("p", 1, 0.5)
        training = call.argument("training", 2, True)
        mode = ""
        if not isinstance(p, int | float) or not isinstance(training, bool):
            return WHOLE
    (name,) = call.inputs
    axis = call.axes[name]
    result = Judgement(effect=Effect.CHANNELWISE, channel_axis=axis)
    if not training or p == 0:
        return result
    per = kind.removeprefix("alpha ")
    if per == "depth":
        per = "image" if mode == "row" else "batch"
    if per == "channel" and axis != 1:
        return _imagewise(call)
    order = call.order if per == "element" else ()
    return replace(result, noise=Noise(per, float(p), alpha=kind.startswith("alpha"), order=order))


def _dims(call: Call, given: Any) -> tuple[int, ...] | None:
    """Axes as numbers from 0; None if they are not known."""
    dims = given if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(one, int) for one in dims):
        return None
    return tuple(one % call.tensors[0].dim() for one in dims)


def _input_axis(call: Call) -> int:
    return next(call.axes[name] for name, value in call.inputs.items() if isinstance(value, torch.Tensor))


def _reduction(call: Call) -> Judgement:
    dims = _dims(call, call.argument("dim", 1))
    if dims is None or 0 in dims or not call.is_images(call.result) or not _all_images(call):
        return WHOLE
    axis = _input_axis(call)
    if axis in dims:
        return _imagewise(call)
    kept = call.argument("keepdim", 2, False)
    if not isinstance(kept, bool):
        return WHOLE
    return Judgement(effect=Effect.CHANNELWISE, channel_axis=axis - (0 if kept else sum(one < axis for one in dims)))


def _permutation(call: Call) -> Judgement:
    arguments = call.node.args[1:] or (call.node.kwargs.get("dims"),)
    dims = _dims(call, arguments[0] if isinstance(arguments[0], list | tuple) else arguments)
    if dims is None or dims[0] != 0 or not _all_images(call):
        return WHOLE
    return Judgement(effect=Effect.CHANNELWISE, channel_axis=dims.index(_input_axis(call)))


def _transposition(call: Call) -> Judgement:
    dims = _dims(call, (call.argument("dim0", 1), call.argument("dim1", 2)))
    if dims is None or 0 in dims or not _all_images(call):
        return WHOLE
    axis = _input_axis(call)
    return Judgement(effect=Effect.CHANNELWISE, channel_axis={dims[0]: dims[1], dims[1]: dims[0]}.get(axis, axis))


def _concatenation(call: Call) -> Judgement:
    dims = _dims(call, call.argument("dim", 1, 0))
    if dims is None or 0 in dims or not call.is_images(call.result):
        return WHOLE
    axes = {call.axes[name] for name in call.inputs}
    if len(axes) == 1 and not axes & set(dims) and not call.parameters:
        return Judgement(effect=Effect.CHANNELWISE, channel_axis=axes.pop())
    return _imagewise(call, axes.pop() if len(axes) == 1 else 1)


def _along(position: int, name: str = "dim", default: int = 0) -> Callable[[Call], Judgement]:
    """A rule for operations that part or mix along one axis, which must not be that of the images."""

    def rule(call: Call) -> Judgement:
        if not call.tensors:
            return WHOLE
        dims = _dims(call, call.argument(name, position, default))
        return WHOLE if dims is None or 0 in dims else _imagewise(call, _input_axis(call))

    return rule


def _flattening(call: Call) -> Judgement:
    if not call.tensors or not _all_images(call):
        return WHOLE
    dims = call.tensors[0].dim()
    if isinstance(call.module, nn.Flatten):
        start, end = call.module.start_dim, call.module.end_dim
    else:
        start, end = call.argument("start_dim", 1, 0), call.argument("end_dim", 2, -1)
    if (start % dims, end % dims) == (1, dims - 1) and _input_axis(call) == 1:
        return Judgement(effect=Effect.FLATTEN)
    return _imagewise(call) if start % dims and call.is_images(call.result) else WHOLE


def _reshaping(call: Call) -> Judgement:
    """``x.view(x.size(0), -1)`` and kin."""
    if not call.is_images(call.result) or len(call.tensors) != 1 or not _all_images(call):
        return WHOLE
    source, axis = call.tensors[0], _input_axis(call)
    if call.result.dim() == 2 and axis == 1:
        return Judgement(effect=Effect.FLATTEN)
    # Moving axes about is for all channels at once; the channels stay where they were if nothing before them changes.
    same = source.shape[: axis + 1] == call.result.shape[: axis + 1]
    return _imagewise(call, axis if same else 1)


def _item(call: Call) -> Judgement:
    """``x[:, 0]`` of a tensor, or one of several results."""
    index = call.node.args[1]
    if not call.tensors:
        return _look(call)
    first = index[0] if isinstance(index, tuple) else index
    whole = isinstance(first, slice) and first == slice(None)
    return _imagewise(call) if whole and len(call.inputs) == 1 and call.is_images(call.result) else WHOLE


def _changed_item(call: Call) -> Judgement:
    """``x[:, 0] = value``."""
    index = call.node.args[1]
    first = index[0] if isinstance(index, tuple) else index
    every = isinstance(first, slice) and first == slice(None)
    return _imagewise(call) if every and len(call.tensors) == len(call.inputs) and not call.parameters else WHOLE


def _look(call: Call) -> Judgement:
    """Shapes, numbers made of them, and parts of several results: they go with what uses them."""
    harmless = not call.parameters and not isinstance(call.result, torch.Tensor)
    from_one = call.node.target is operator.getitem and isinstance(call.node.args[1], int)
    return Judgement(effect=Effect.IMAGEWISE) if harmless or from_one else WHOLE


def _shape(call: Call) -> Judgement:
    of_shape = call.node.op == "call_method" or call.node.args[1] in ("shape", "ndim", "dtype")
    return Judgement(effect=Effect.IMAGEWISE) if of_shape and _all_images(call) else WHOLE


_RULES: dict[Any, Callable[[Call], Judgement]] = {
    nn.Flatten: _flattening, torch.flatten: _flattening, "flatten": _flattening,
    "view": _reshaping, "reshape": _reshaping, torch.reshape: _reshaping,
    torch.mean: _reduction, "mean": _reduction, torch.sum: _reduction, "sum": _reduction, torch.amax: _reduction,
    "amax": _reduction,
    torch.permute: _permutation, "permute": _permutation, torch.transpose: _transposition, "transpose": _transposition,
    torch.cat: _concatenation, torch.concat: _concatenation,
    torch.chunk: _along(2), "chunk": _along(2), torch.split: _along(2), "split": _along(2),
    torch.softmax: _along(1), torch.nn.functional.softmax: _along(1), torch.unsqueeze: _along(1),
    "unsqueeze": _along(1), "squeeze": _along(1), torch.squeeze: _along(1),
    operator.getitem: _item, with_item: _changed_item, getattr: _shape, "size": _shape, "dim": _shape,
    operator.floordiv: _look, operator.mod: _look,
}  # fmt: skip
