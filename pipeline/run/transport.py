"""Carry out an exchange: pack boxes, send and receive them all at once, put them where they belong.

Tensors are seen as ``x_ICE``: images, channels, everything else. gloo wants contiguous CPU memory, so boxes are packed into
staging buffers that live as long as the transport (pinned where a GPU is involved); a box that is already contiguous in CPU
memory is sent and received in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pipeline.cluster.gang import RankContext
from pipeline.plan.layouts import Box, Message
from pipeline.plan.program import Exchange, TensorSpec


class Transport:
    """The exchanges of one rank."""

    def __init__(self, context: RankContext) -> None:
        self.rank = context.rank
        self.group = context.group
        self.device = context.torch_device
        self._buffers: dict[tuple[object, ...], torch.Tensor] = {}

    def exchange(self, instruction: Exchange, source: torch.Tensor | None, target: torch.Tensor | None) -> None:
        """Carry out ``instruction`` for this rank.

        ``source`` is the local part this rank holds in the layout it comes from (in the direction of the instruction) and
        ``target`` the local part to be overwritten, each None where the rank holds nothing. A target element that
        several messages carry becomes their sum, always in the same order, so that runs repeat bit by bit.

        Raises gloo's ``RuntimeError`` if another rank is gone.
        """
        spec = instruction.spec
        forward = instruction.direction == "forward"
        held, wanted = (
            spec.boxes(placed.layout)[self.rank]
            for placed in ((instruction.source, instruction.target) if forward else (instruction.target, instruction.source))
        )
        x_ICE = _view(source, spec, held)
        y_ICE = _view(target, spec, wanted)
        outgoing = [m for m in instruction.messages if m.source == self.rank and m.target != self.rank]
        incoming = [m for m in instruction.messages if m.target == self.rank]
        key = (instruction.name, instruction.direction, spec.view)
        sums = _overlapping(incoming)
        arrivals: list[tuple[Message, torch.Tensor | None]] = []
        operations: list[dist.P2POp] = []
        for index, message in enumerate(incoming):
            if message.source == self.rank:
                arrivals.append((message, None))
                continue
            assert y_ICE is not None
            part = _part(y_ICE, wanted, message.box)
            in_place = not sums and part.is_contiguous() and part.device.type == "cpu"
            buffer = part if in_place else self._buffer((*key, "in", index), part.shape, part.dtype)
            arrivals.append((message, None if in_place else buffer))
            operations.append(dist.P2POp(dist.irecv, buffer, message.source, self.group))
        for index, message in enumerate(outgoing):
            assert x_ICE is not None
            operations.append(dist.P2POp(dist.isend, self._packed((*key, "out", index), x_ICE, held, message), message.target, self.group))
        requests = dist.batch_isend_irecv(operations) if operations else []
        self._place_own(incoming, x_ICE, held, y_ICE, wanted, sums)
        for request in requests:
            request.wait()
        for message, buffer in arrivals:
            if buffer is None or y_ICE is None:
                continue
            part = _part(y_ICE, wanted, message.box)
            if sums:
                part.add_(buffer.to(part.device))
            else:
                part.copy_(buffer, non_blocking=False)

    def _packed(self, key: tuple[object, ...], x_ICE: torch.Tensor, held: Box, message: Message) -> torch.Tensor:
        part = _part(x_ICE, held, message.box)
        if part.is_contiguous() and part.device.type == "cpu":
            return part
        return self._buffer(key, part.shape, part.dtype).copy_(part)

    def _place_own(
        self,
        incoming: Sequence[Message],
        x_ICE: torch.Tensor | None,
        held: Box,
        y_ICE: torch.Tensor | None,
        wanted: Box,
        sums: bool,
    ) -> None:
        """Local copies, made while the messages are under way; what is summed or left out begins at zero."""
        if y_ICE is None:
            return
        own = [message.box for message in incoming if message.source == self.rank]
        covered = own if sums else [message.box for message in incoming]
        if sum(box.size for box in covered) < wanted.size:
            y_ICE.zero_()
        for box in own:
            assert x_ICE is not None
            _part(y_ICE, wanted, box).copy_(_part(x_ICE, held, box))

    def _buffer(self, key: tuple[object, ...], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        full_key = (*key, tuple(shape), dtype)
        if full_key not in self._buffers:
            pinned = self.device.type == "cuda"
            self._buffers[full_key] = torch.empty(tuple(shape), dtype=dtype, pin_memory=pinned)
        return self._buffers[full_key]


def _view(tensor: torch.Tensor | None, spec: TensorSpec, box: Box) -> torch.Tensor | None:
    """A local part as (images, channels, rest); a copy only where a gradient came out strided."""
    if tensor is None:
        return None
    return tensor.reshape(len(box.images), len(box.channels), spec.view[2])


def _part(x_ICE: torch.Tensor, outer: Box, box: Box) -> torch.Tensor:
    return x_ICE[box.images.within(outer.images), box.channels.within(outer.channels)]


def _overlapping(incoming: Sequence[Message]) -> bool:
    """Whether some element arrives more than once, so that arrivals have to be summed."""
    return any(
        one.box & other.box for index, one in enumerate(incoming) for other in incoming[index + 1 :]
    )
