"""A model as a list of operations, each with its inputs, its output shape and its effect on layouts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from pipeline.graph.effects import Effect
from pipeline.graph.evaluation import evaluated
from pipeline.graph.nodes import INPUT, Node

_RATE = re.compile(r"-?(?:\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]\d+)")
"""A number that is not whole."""


@dataclass(frozen=True)
class Noise:
    """What a random operation multiplies its input by."""

    per: str
    """``element`` or ``channel``: what one draw decides."""
    p: float
    """Probability of dropping."""
    alpha: bool = False
    """Whether what is dropped is set to SELU's negative limit and the rest rescaled (alpha dropout)."""
    order: tuple[int, ...] = ()
    """For ``element``, the axes of the tensor from the outermost to the innermost in memory, in which it is drawn."""
    folded: tuple[int, ...] = ()
    """Shape of the tensor for one image, with the extent of the images' axis per image, where that is not axis 0 or
    an image has several entries along it; else empty."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter or buffer of an operation."""

    name: str
    """Qualified name in the model, e.g. ``conv1.weight``."""
    shape: tuple[int, ...]
    trained: bool
    """Whether it gets a gradient: never for buffers, nor where none flows to it."""
    buffer: bool
    dtype: torch.dtype
    axis: int | None = None
    """The axis that goes with the output's channels; None if it is the same for all of them."""
    input_axis: int | None = None
    """The axis that goes with the input's channels."""


@dataclass(frozen=True)
class Cut:
    """Of a tensor that every rank can make for itself, the axes of which a split needs only a part."""

    images: int | None = None
    channels: int | None = None
    inputs: int | None = None
    """The axis that goes with the input's channels."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One call of the captured model, with what leads to it from weights and sizes alone."""

    name: str
    effect: Effect
    nodes: tuple[Node, ...]
    """The calls to carry out in order; the last one gives the output."""
    call: str
    """What it calls, with the arguments that are no tensors."""
    text: str
    """All that a submodule that runs as it is tells of itself; else nothing."""
    inputs: tuple[str, ...]
    """Names of the operations whose output it takes; ``graph.input`` is the batch."""
    shape: tuple[int, ...] | None
    """Shape of its output for one image, ``(C, H, W)`` or ``(C,)``; None where the output is not a tensor of images."""
    dtype: torch.dtype
    """Of its output."""
    images_axis: int
    """Axis of the images in its output."""
    per_image: int
    """Entries along it for each image; 0 if it has no such axis."""
    channel_axis: int
    """Axis of the channels in its output, counting the images' as 0."""
    unit: int
    """How many adjacent output channels stay together: the width of a group."""
    input_unit: int
    """The same for its input."""
    noise: Noise | None
    """What a random operation multiplies its input by."""
    cuts: Mapping[str, Cut]
    """By the name of a weight or of one of its own calls, how it is cut where the operation is split."""
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
    module: str
    """The submodule it belongs to."""

    @property
    def main(self) -> Node:
        """The call that gives its output."""
        return self.nodes[-1]

    @property
    def tracks(self) -> bool:
        """Whether it is a BatchNorm that keeps running statistics."""
        return self.effect is Effect.BATCHNORM and self.main.argument("running_mean") is not None

    @property
    def channels(self) -> int:
        """Channels (features after flatten) of the output."""
        return self.shape[self.channel_axis - 1] if self.shape else 0


@dataclass(frozen=True)
class Opaque:
    """A submodule that runs as it is, on one device."""

    name: str
    """``""`` is the model itself."""
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({self.reason})"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The operations of a model in the order they run."""

    input: str
    input_shape: tuple[int, ...]
    """Shape of one image, ``(C, H, W)``."""
    dtype: torch.dtype
    """The number type of the model: that of its first floating-point parameter."""
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]
    """What the model returns: most often one, with auxiliary heads several."""
    returned: Any = field(compare=False)
    """The structure that it returns, with the names of operations for tensors."""
    evaluable: bool
    """Whether evaluation mode runs the same operations as training."""
    sources: tuple[Node, ...] = ()
    """Calls that draw random numbers of which every rank can take its part, with what leads to them."""
    drawn: tuple[str, ...] = ()
    """The calls among ``sources`` and the operations that draw random numbers, in order."""
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Tensors that the model's code makes of numbers."""
    opaque: tuple[Opaque, ...] = ()
    convolution_flops: int = 0
    """FLOPs per image of all convolutions of the model, those in opaque parts included."""
    inputs: tuple[int | str, ...] = (0,)
    """Position or keyword of every input of the model, the one called ``input`` first."""

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

    @cached_property
    def evaluation(self) -> Mapping[str, Node | None]:
        """By name, the calls that are others in evaluation; None for those that are left out."""
        return evaluated([*self.sources, *(node for one in self.operations for node in one.nodes)])

    @property
    def convolutions(self) -> tuple[Operation, ...]:
        """The operations that are convolutions."""
        return tuple(operation for operation in self.operations if operation.convolution)

    @cached_property
    def further_inputs(self) -> tuple[str, ...]:
        """The operations that stand for the inputs beside the first one."""
        return tuple(one.name for one in self.operations if one.main.target == INPUT)

    @property
    def input_forms(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape for one image and number type of every input that is a tensor of images."""
        others = (self[name] for name in self.further_inputs)
        return (self.input_shape, self.dtype), *((one.shape or (), one.dtype) for one in others)

    def inputs_of(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What the model takes, of a tensor for each of its inputs: one, a tuple, or a dictionary of them."""
        if len(tensors) == 1 and self.inputs == (0,):
            return tensors[0]
        if all(isinstance(key, int) for key in self.inputs):
            return tuple(tensors)
        return dict(zip(map(str, self.inputs), tensors, strict=True))

    @cached_property
    def submodules(self) -> tuple[str, ...]:
        """The names of the submodules that run as they are, in the order of their calls."""
        called = (node.submodule for operation in self.operations for node in operation.nodes)
        return tuple(dict.fromkeys(name for name in called if name is not None))

    def shape_of(self, value: str) -> tuple[int, ...] | None:
        """Shape for one image of an operation's output or of the batch."""
        return self.input_shape if value == self.input else self[value].shape

    def dtype_of(self, value: str) -> torch.dtype:
        """Number type of an operation's output or of the batch."""
        return self.dtype if value == self.input else self[value].dtype

    def channels_of(self, value: str) -> int:
        """Channels of an operation's output or of the batch."""
        return self.input_shape[0] if value == self.input else self[value].channels

    def channel_axis_of(self, value: str) -> int:
        """Axis of the channels of an operation's output or of the batch."""
        return 1 if value == self.input else self[value].channel_axis
