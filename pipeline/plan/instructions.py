"""The instructions of a program, and the tensors that they speak of."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pipeline.plan.layouts import Box, Layout, Message, messages, transposed
from pipeline.plan.traffic import Traffic, taking_part, traffic

Direction = Literal["forward", "backward"]
Part = Literal["whole", "moments", "normalise", "track"]
"""What a step does of its operation: all of it, or under a batch split one of the three parts of BatchNorm."""

LOSS = "loss"


@dataclass(frozen=True)
class Placed:
    """A tensor in a layout: what a rank looks up when it needs "the output of conv1, split by kernels"."""

    name: str
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Global shape of a tensor and the two axes a layout may split."""

    shape: tuple[int, ...]
    channel_axis: int
    images_axis: int | None
    """None for parameters: they have no images."""

    @property
    def images(self) -> int:
        """Extent of the axis of the images; 1 for a parameter."""
        return 1 if self.images_axis is None else self.shape[self.images_axis]

    @property
    def channels(self) -> int:
        """Extent of the axis of the channels; 1 for a scalar, and for one number per image."""
        return self.shape[self.channel_axis] if self._has_channels else 1

    @property
    def _has_channels(self) -> bool:
        return self.channel_axis < len(self.shape)

    @property
    def rest(self) -> int:
        """Elements per image and channel."""
        return math.prod(self.shape) // max(self.images * self.channels, 1)

    def local_shape(self, box: Box) -> tuple[int, ...]:
        """Shape of the part of the tensor in ``box``."""
        shape = list(self.shape)
        if self._has_channels:
            shape[self.channel_axis] = len(box.channels)
        if self.images_axis is not None:
            shape[self.images_axis] = len(box.images)
        return tuple(shape)

    def slices(self, outer: Box, inner: Box) -> tuple[slice, ...]:
        """The index of ``inner`` in a local tensor that holds ``outer``."""
        index = [slice(None)] * len(self.shape)
        if self._has_channels:
            index[self.channel_axis] = inner.channels.within(outer.channels)
        if self.images_axis is not None:
            index[self.images_axis] = inner.images.within(outer.images)
        return tuple(index)

    def boxes(self, layout: Layout) -> tuple[Box, ...]:
        """The box of every rank."""
        return layout.boxes(self.images, self.channels)


Company = Literal["master", "everyone", "moments"]
COMPANIES: tuple[Company, ...] = ("master", "everyone", "moments")
"""An exchange of activations between all ranks or of moments of batch normalisation; all else is as with the master."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation, or a part of it, within a computation."""

    operation: str
    part: Part
    inputs: tuple[Placed, ...]
    output: Placed | None
    """None where it only keeps statistics."""
    images: tuple[int, ...] = ()
    """Of a part of BatchNorm, the images on each rank."""
    in_place: bool = False
    """Whether it may write to its first input, which nothing else reads."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Run the operations of one segment on the ranks that hold its outputs."""

    name: str
    direction: Direction
    segment: int
    """Its number in the forward half; the backward instruction carries the same."""
    steps: tuple[Step, ...]
    """Empty for the loss."""
    inputs: tuple[Placed, ...]
    outputs: tuple[Placed, ...]
    ranks: tuple[int, ...]
    gradients: Literal["all", "inputs", "parameters"] = "all"
    """Backward, whose gradients it computes; of a pair, ``inputs`` comes first."""

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of its operations."""
        return tuple(dict.fromkeys(step.operation for step in self.steps))


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Move a tensor from one layout to another; backward, its gradient the other way, with sums for copies."""

    name: str
    direction: Direction
    source: Placed
    target: Placed
    spec: TensorSpec
    moves: Literal["activation", "parameter", "gradients"] = "activation"
    """An activation; a parameter from its home to where it works; or the gradients of parameters that several ranks
    have a copy of, many in one, to be summed."""
    deferred: bool = False
    """Whether it runs beside what follows. An activation has to be there after the next computation of weights'
    gradients, gradients when the exchange that takes them up or the update begins."""

    once: bool = False
    """Whether it happens only once, and needs no memory kept for the next time."""

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        """What travels in this direction, local copies included."""
        forward = messages(self.source.layout, self.target.layout, self.spec.images, self.spec.channels)
        return forward if self.direction == "forward" else transposed(forward)

    @cached_property
    def tags(self) -> tuple[int, ...]:
        """A number for every message that both its ends know, so that exchanges under way at once are not mixed up."""
        key = self.name, self.source, self.target, self.direction, self.spec.shape
        return tuple(zlib.crc32(repr((key, one.box)).encode()) & 0x7FFFFFFF for one in self.messages)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that send, receive, or keep what they have."""
        return taking_part(self.source.layout, self.target.layout, self.spec.images, self.spec.channels)

    @property
    def company(self) -> Company:
        """Who waits for whom: one of ``COMPANIES``."""
        if self.moves == "activation" and self.spec.images_axis is None:
            return "moments"
        with_master = "M" in (self.source.layout.kind, self.target.layout.kind)
        return "everyone" if self.moves == "activation" and not with_master else "master"

    @property
    def traffic(self) -> Traffic:
        """How much travels in this direction between which ranks."""
        forward = traffic(self.source.layout, self.target.layout, self.spec.images, self.spec.channels)
        return forward if self.direction == "forward" else forward.transposed

    @property
    def elements(self) -> int:
        """Elements that travel between different ranks."""
        return int(self.traffic.sent[1].sum()) * self.spec.rest

    @property
    def master_elements(self) -> int:
        """Elements that the master, rank 0, sends to other ranks or receives from them."""
        return int(self.traffic.sent[1][0] + self.traffic.received[1][0]) * self.spec.rest


@dataclass(frozen=True, kw_only=True)
class Update:
    """Let the optimiser update the parameters whose home is on the rank."""

    name: str
    ranks: tuple[int, ...]


Instruction = Compute | Exchange | Update


def may_go_on(exchange: Exchange, following: Instruction | None) -> bool:
    """Whether a deferred exchange may still be under way during ``following``; at the end of a step none may."""
    if exchange.moves == "gradients":
        takes_up = isinstance(following, Exchange) and following.source == exchange.target
        return isinstance(following, Compute | Exchange) and not takes_up
    return isinstance(following, Compute) and following.gradients == "parameters"
