"""Carry out an exchange: pack boxes, send and receive them all at once, put them where they belong.

gloo wants contiguous CPU memory, so boxes are packed into staging buffers that live as long as the transport (pinned
where a GPU is involved); a box that is already contiguous in CPU memory is sent and received in place. Between CPU
ranks on one host, boxes go through shared memory instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from pipeline.cluster.gang import RankContext
from pipeline.errors import InputError
from pipeline.links import Link
from pipeline.plan.instructions import Exchange
from pipeline.plan.layouts import Box, Message
from pipeline.run.link_emulation import Ports
from pipeline.run.memory_format import in_memory_order
from pipeline.run.shared_memory import Neighbour, Outbox, neighbours


class Transport:
    """The exchanges of one rank."""

    def __init__(
        self,
        context: RankContext,
        *,
        shared_memory: bool = True,
        link: Link | None = None,
        channels_last: bool = False,
    ) -> None:
        """Every rank of the gang must call this at the same point.

        ``shared_memory=False`` sends all through gloo; ``link`` is emulated, which takes CPU devices on one host.
        With ``channels_last`` boxes are packed in that order, which the tensors should have. Raises ``InputError``
        where a link cannot be emulated.
        """
        self.rank = context.rank
        self.group = context.group
        self.device = context.torch_device
        self._neighbours = neighbours(context) if shared_memory else {}
        self._ports = Ports(link)
        self._channels_last = channels_last
        if link is not None and len(self._neighbours) < context.size - 1:
            raise InputError("a link can only be emulated between CPU devices of one host: use loopback, or only these")
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
        neither tensor may be changed, nor the target read. The target may lie within the source, or the other way
        round, where this rank's own part is.

        Raises gloo's ``RuntimeError`` or ``RankLost``, here or at the end, if another rank is gone.
        """
        spec = instruction.spec
        forward = instruction.direction == "forward"
        source, target = (
            None if one is None else in_memory_order(one, channels_last=self._channels_last) for one in (source, target)
        )
        held, wanted = (
            spec.boxes(placed.layout)[self.rank]
            for placed in (
                (instruction.source, instruction.target) if forward else (instruction.target, instruction.source)
            )
        )
        tagged = list(zip(instruction.messages, instruction.tags, strict=True))
        incoming = [(message, tag) for message, tag in tagged if message.target == self.rank]
        outgoing = [(message, tag) for message, tag in tagged if message.source == self.rank != message.target]
        sums = _overlapping([message for message, _ in incoming])
        if target is not None and sum(message.box.size for message, _ in incoming) < wanted.size:
            target.zero_()  # what no message reaches
        arrivals: list[_Arrival] = []
        if target is not None:
            arrivals = [
                self._arrival(instruction, one, tag, source, target, held, wanted, sums) for one, tag in incoming
            ]
        requests, kept = self._begin_messages(instruction, arrivals, outgoing, source, held)
        in_place = any(one.is_there for one in arrivals)
        if not sums:
            for one in arrivals:  # local copies, made while the messages are under way
                if one.source == self.rank and not one.is_there:
                    self._take_out(one, add=False)

        @torch.no_grad()
        def finish() -> None:
            for request in requests:
                request.wait()
            kept.clear()
            if sums and target is not None and arrivals[0].part.shape != target.shape and not in_place:
                target.zero_()
            for index, one in enumerate(arrivals):
                if sums and not one.is_there:
                    # In the order of the messages, own ones among them: all ranks round alike. Where a rank adds to
                    # what it has, no other sums the same.
                    whole = target is not None and one.part.shape == target.shape
                    self._take_out(one, add=index > 0 or in_place or not whole)
                elif one.source != self.rank:
                    self._take_out(one, add=False)
            self._ports.drain()

        return finish

    def _begin_messages(
        self,
        instruction: Exchange,
        arrivals: Sequence[_Arrival],
        outgoing: Sequence[tuple[Message, int]],
        source: torch.Tensor | None,
        held: Box,
    ) -> tuple[list[dist.Work], list[torch.Tensor]]:
        """Send and be ready to receive; what gloo is to be asked for the end, and what must stay alive until then."""
        kept = []
        operations = [
            dist.P2POp(dist.irecv, one.box, one.source, self.group, one.tag)
            for one in arrivals
            if one.through_gloo and one.box is not None
        ]
        for message, tag in outgoing:
            assert source is not None
            part = source[self._index(instruction, held, message.box)]
            if message.target in self._neighbours:
                left = 0.0 if instruction.once else self._ports.leave(part.numel() * part.element_size())
                self._outbox(tag, self._neighbours[message.target], part, once=instruction.once).post(part, left)
                continue
            kept.append(part.contiguous().cpu() if instruction.once else self._packed((tag, message.target), part))
            operations.append(dist.P2POp(dist.isend, kept[-1], message.target, self.group, tag))
        return (dist.batch_isend_irecv(operations) if operations else []), kept

    def _take_out(self, one: _Arrival, *, add: bool) -> None:
        """Bring what has arrived to where it belongs; from a neighbour, wait for it first."""
        box, receipt = one.box, None
        if box is None:
            box, receipt, left = self._neighbours[one.source].receive(one.tag, one.part)
            if left:
                self._ports.arrive(left, box.numel() * box.element_size())
        if add:
            one.part.add_(box.to(one.part.device))
        elif box is not one.part:
            one.part.copy_(box)
        if receipt is not None:
            receipt.sign()

    def _arrival(
        self,
        instruction: Exchange,
        message: Message,
        tag: int,
        source: torch.Tensor | None,
        target: torch.Tensor,
        held: Box,
        wanted: Box,
        sums: bool,
    ) -> _Arrival:
        """Where a message arrives, and the part of the target it is for."""
        part = target[self._index(instruction, wanted, message.box)]
        if message.source == self.rank:
            assert source is not None
            own = source[self._index(instruction, held, message.box)]
            return _Arrival(message.source, tag, own, part, through_gloo=False)
        if message.source in self._neighbours:
            return _Arrival(message.source, tag, None, part, through_gloo=False)
        direct = not sums and part.is_contiguous() and part.device.type == "cpu"
        if not direct and instruction.once:
            box = torch.empty(part.shape, dtype=part.dtype)
        else:
            box = part if direct else self._buffer((tag, message.source, "in"), part)
        return _Arrival(message.source, tag, box, part, through_gloo=True)

    def _index(self, instruction: Exchange, outer: Box, inner: Box) -> tuple[slice, ...]:
        """The index of ``inner`` in a local tensor that holds ``outer``, with the axes in the order of memory."""
        index = instruction.spec.slices(outer, inner)
        return (index[0], index[2], index[3], index[1]) if self._channels_last and len(index) == 4 else index

    def _outbox(self, tag: int, neighbour: Neighbour, part: torch.Tensor, *, once: bool) -> Outbox:
        if once:
            return Outbox(neighbour, tag, part, once=True)
        key = (tag, neighbour.rank, tuple(part.shape), part.dtype)
        if key not in self._outboxes:
            self._outboxes[key] = Outbox(neighbour, tag, part)
        return self._outboxes[key]

    def _packed(self, key: tuple[object, ...], part: torch.Tensor) -> torch.Tensor:
        """The part in contiguous CPU memory."""
        if part.is_contiguous() and part.device.type == "cpu":
            return part
        return self._buffer((*key, "out"), part).copy_(part)

    def _buffer(self, key: tuple[object, ...], like: torch.Tensor) -> torch.Tensor:
        """A staging buffer in CPU memory of the shape and type of ``like``; the same one for the same key."""
        full_key = (*key, tuple(like.shape), like.dtype)
        if full_key not in self._buffers:
            pinned = self.device.type == "cuda"
            self._buffers[full_key] = torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
        return self._buffers[full_key]


class _Arrival(NamedTuple):
    """A message to this rank, from another or from itself."""

    source: int
    tag: int
    box: torch.Tensor | None
    """Where its content is or will be; None if a neighbour will tell."""
    part: torch.Tensor
    """Where it belongs; ``box`` itself if gloo can receive into that."""
    through_gloo: bool

    @property
    def is_there(self) -> bool:
        """Whether it is where it belongs from the beginning."""
        return self.box is not None and not self.through_gloo and self.box.data_ptr() == self.part.data_ptr()


def _overlapping(incoming: Sequence[Message]) -> bool:
    """Whether some element arrives more than once, so that arrivals have to be summed."""
    return any(one.box & other.box for index, one in enumerate(incoming) for other in incoming[index + 1 :])
