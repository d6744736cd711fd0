"""Carry out an exchange: pack boxes, send and receive them all at once, put them where they belong.

Tensors are seen as ``x_ICE``: images, channels, everything else. gloo wants contiguous CPU memory, so boxes are packed
into staging buffers that live as long as the transport (pinned where a GPU is involved); a box that is already
contiguous in CPU memory is sent and received in place. Between CPU ranks on one host, boxes go through shared memory
instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from pipeline.cluster.gang import RankContext
from pipeline.plan.layouts import Box, Message
from pipeline.plan.program import Exchange, TensorSpec
from pipeline.run.shared_memory import Neighbour, Outbox, neighbours


class Transport:
    """The exchanges of one rank."""

    def __init__(self, context: RankContext, *, shared_memory: bool = True) -> None:
        """Every rank of the gang must call this at the same point; ``shared_memory=False`` sends all through gloo."""
        self.rank = context.rank
        self.group = context.group
        self.device = context.torch_device
        self._neighbours = neighbours(context) if shared_memory else {}
        self._buffers: dict[tuple[object, ...], torch.Tensor] = {}
        self._outboxes: dict[tuple[object, ...], Outbox] = {}

    def exchange(self, instruction: Exchange, source: torch.Tensor | None, target: torch.Tensor | None) -> None:
        """Carry out ``instruction`` for this rank, from start to end; see ``start``."""
        self.start(instruction, source, target)()

    @torch.no_grad()
    def start(
        self, instruction: Exchange, source: torch.Tensor | None, target: torch.Tensor | None
    ) -> Callable[[], None]:
        """Begin ``instruction`` for this rank; calling what is returned waits for its end.

        ``source`` is the local part this rank holds in the layout it comes from (in the direction of the instruction)
        and ``target`` the local part to be overwritten, each None where the rank holds nothing. A target element that
        several messages carry becomes their sum, always in the same order, so that runs repeat bit by bit. In between
        neither tensor may be changed, nor the target read.

        Raises gloo's ``RuntimeError`` or ``RankLost``, here or at the end, if another rank is gone.
        """
        spec = instruction.spec
        forward = instruction.direction == "forward"
        held, wanted = (
            spec.boxes(placed.layout)[self.rank]
            for placed in (
                (instruction.source, instruction.target) if forward else (instruction.target, instruction.source)
            )
        )
        x_ICE = _view(source, spec, held)
        # A target in another memory format, such as channels_last, is filled by way of a contiguous one.
        strided = target is not None and not target.is_contiguous()
        landing = torch.empty(target.shape, dtype=target.dtype, device=target.device) if strided else target  # type: ignore[union-attr]
        y_ICE = _view(landing, spec, wanted)
        incoming = [message for message in instruction.messages if message.target == self.rank]
        outgoing = [message for message in instruction.messages if message.source == self.rank != message.target]
        sums = _overlapping(incoming)
        key = (instruction.name, instruction.direction, spec.view)
        self._clear(incoming, y_ICE, wanted, sums)
        arrivals = self._arrivals(key, incoming, y_ICE, wanted, in_place=not sums)
        receives = [
            dist.P2POp(dist.irecv, one.buffer, one.source, self.group) for one in arrivals if one.buffer is not None
        ]
        sends = []
        for index, message in enumerate(outgoing):
            assert x_ICE is not None
            part = _part(x_ICE, held, message.box)
            if message.target in self._neighbours:
                self._outbox((*key, index), self._neighbours[message.target], part).post(part)
            else:
                sends.append(dist.P2POp(dist.isend, self._packed((*key, index), part), message.target, self.group))
        requests = dist.batch_isend_irecv(receives + sends) if receives or sends else []
        self._place_own(incoming, x_ICE, held, y_ICE, wanted)

        @torch.no_grad()
        def finish() -> None:
            for request in requests:
                request.wait()
            sends.clear()  # until here they kept alive what was sent from its own memory
            for one in arrivals:
                self._take_out(one, sums=sums)
            if strided and target is not None and landing is not None:
                target.copy_(landing)

        return finish

    def _take_out(self, one: _Arrival, *, sums: bool) -> None:
        """Bring what has arrived to where it belongs; from a neighbour, wait for it first."""
        if one.buffer is None:
            box, receipt = self._neighbours[one.source].receive(one.part)
        else:
            box, receipt = one.buffer, None
        if sums:
            one.part.add_(box.to(one.part.device))
        elif box is not one.part:
            one.part.copy_(box)
        if receipt is not None:
            receipt.sign()

    def _arrivals(
        self,
        key: tuple[object, ...],
        incoming: Sequence[Message],
        y_ICE: torch.Tensor | None,
        wanted: Box,
        *,
        in_place: bool,
    ) -> list[_Arrival]:
        """Where each message from another rank arrives, and the part of the target it is for."""
        found = []
        for index, message in enumerate(incoming):
            if message.source != self.rank and y_ICE is not None:
                part = _part(y_ICE, wanted, message.box)
                direct = in_place and part.is_contiguous() and part.device.type == "cpu"
                buffer: torch.Tensor | None = None
                if message.source not in self._neighbours:
                    buffer = part if direct else self._buffer((*key, "in", index), part)
                found.append(_Arrival(message.source, buffer, part))
        return found

    def _outbox(self, key: tuple[object, ...], neighbour: Neighbour, part: torch.Tensor) -> Outbox:
        full_key = (*key, tuple(part.shape), part.dtype)
        if full_key not in self._outboxes:
            self._outboxes[full_key] = Outbox(neighbour, part)
        return self._outboxes[full_key]

    def _packed(self, key: tuple[object, ...], part: torch.Tensor) -> torch.Tensor:
        """The part in contiguous CPU memory."""
        if part.is_contiguous() and part.device.type == "cpu":
            return part
        return self._buffer((*key, "out"), part).copy_(part)

    def _clear(self, incoming: Sequence[Message], y_ICE: torch.Tensor | None, wanted: Box, sums: bool) -> None:
        """What is summed, or reached by no message, begins at zero; own parts are copied, not summed."""
        covered = [message.box for message in incoming if not sums or message.source == self.rank]
        if y_ICE is not None and sum(box.size for box in covered) < wanted.size:
            y_ICE.zero_()

    def _place_own(
        self,
        incoming: Sequence[Message],
        x_ICE: torch.Tensor | None,
        held: Box,
        y_ICE: torch.Tensor | None,
        wanted: Box,
    ) -> None:
        """Local copies, made while the messages are under way."""
        for message in incoming:
            if message.source == self.rank:
                assert x_ICE is not None
                assert y_ICE is not None
                _part(y_ICE, wanted, message.box).copy_(_part(x_ICE, held, message.box))

    def _buffer(self, key: tuple[object, ...], like: torch.Tensor) -> torch.Tensor:
        """A staging buffer in CPU memory of the shape and type of ``like``; the same one for the same key."""
        full_key = (*key, tuple(like.shape), like.dtype)
        if full_key not in self._buffers:
            pinned = self.device.type == "cuda"
            self._buffers[full_key] = torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
        return self._buffers[full_key]


class _Arrival(NamedTuple):
    """A message under way to this rank."""

    source: int
    buffer: torch.Tensor | None
    """What gloo receives into; None for a box that comes through shared memory."""
    part: torch.Tensor
    """Where its content belongs; ``buffer`` itself if that can be received into."""


def _view(tensor: torch.Tensor | None, spec: TensorSpec, box: Box) -> torch.Tensor | None:
    """A local part as (images, channels, rest); a copy only where a gradient came out strided."""
    if tensor is None:
        return None
    return tensor.reshape(len(box.images), len(box.channels), spec.view[2])


def _part(x_ICE: torch.Tensor, outer: Box, box: Box) -> torch.Tensor:
    return x_ICE[box.images.within(outer.images), box.channels.within(outer.channels)]


def _overlapping(incoming: Sequence[Message]) -> bool:
    """Whether some element arrives more than once, so that arrivals have to be summed."""
    return any(one.box & other.box for index, one in enumerate(incoming) for other in incoming[index + 1 :])
