"""What users would pick instead: torch's DistributedDataParallel with equal parts of the batch."""

from __future__ import annotations

import contextlib
import time
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pipeline.cluster.gang import RankContext
from pipeline.data.batches import Inputs, call, moved, prepared
from pipeline.graph.copies import model_dtype, set_mode
from pipeline.links import Link
from pipeline.run.clock import Clock
from pipeline.run.emulation import Throttle
from pipeline.run.groups import grouped, loss_parameters
from pipeline.run.link_emulation import sleep_until
from pipeline.run.recipe import Loss, Recipe, Turn, from_master, state_of


class DataParallel:
    """One rank of DistributedDataParallel: the whole model, fed with its part of each batch."""

    def __init__(self, context: RankContext, model: nn.Module, recipe: Recipe, link: Link | None = None) -> None:
        self.context, self.device = context, context.torch_device
        self._recipe = recipe.on(self.device)
        self.model = model.to(self.device)
        self.throttle = Throttle(context.device)
        ids = [self.device.index] if self.device.type == "cuda" else None
        step = _WithLoss(self.model, self._recipe.loss)
        self._parallel: nn.Module = DistributedDataParallel(step, device_ids=ids) if context.size > 1 else step
        if link is not None and isinstance(self._parallel, DistributedDataParallel):
            self._parallel.register_comm_hook(_Ring(context, link, self.throttle), _over_link)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        by_name = dict(self.model.named_parameters(remove_duplicate=False))
        groups = grouped(recipe.groups, self._trained, by_name, loss_parameters(self._recipe.loss))
        self._optimizer = recipe.optimizer(groups)
        self._scheduler = recipe.scheduler(self._optimizer) if recipe.scheduler else None
        self.dtype = model_dtype(model)

    def train_step(self, part: float, inputs: Inputs, target: Any, clock: Clock, turn: Turn) -> float:
        """One step on this rank's images, which are ``part`` of the whole batch; the mean loss over them.

        DistributedDataParallel averages gradients over ranks. Where the batch does not divide evenly the loss is
        weighted, so that every image still counts the same.
        """
        set_mode(self.model, training=True)
        with self._summing(turn.last):
            return self._step(part, inputs, target, clock, turn)

    def _step(self, part: float, inputs: Inputs, target: Any, clock: Clock, turn: Turn) -> float:
        if turn.first:
            self._optimizer.zero_grad()
        inputs, target = prepared(inputs, self.device, self.dtype), moved(target, self.device)
        with clock.instruction(0), self.throttle.work():
            loss = self._parallel(inputs, target)
            self._synchronise()
        with clock.instruction(1), self.throttle.work():
            (loss * (part * self.context.size * turn.weight)).backward()
            self._synchronise()
        if turn.last:
            with clock.instruction(2), self.throttle.work():
                self._update()
                self._synchronise()
        return float(loss.detach())

    def loss_state(self) -> dict[str, torch.Tensor] | None:
        """The state dict of a loss that is a module."""
        return state_of(self._recipe.loss)

    def end_epoch(self, value: float | None) -> None:
        """Go on in a schedule by epochs; the master gives the ``value`` of the epoch, which some schedules go by.

        Every rank must call this.
        """
        if self._scheduler is None or self._recipe.scheduled_by != "epoch":
            return
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(from_master(value, self.context))
        else:
            self._scheduler.step()

    def _summing(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients travel once for all batches that are accumulated."""
        if last or not isinstance(self._parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return cast("contextlib.AbstractContextManager[None]", self._parallel.no_sync())

    def _update(self) -> None:
        if self._recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._trained, self._recipe.clip_norm)
        if self._recipe.clip_value is not None:
            nn.utils.clip_grad_value_(self._trained, self._recipe.clip_value)
        self._optimizer.step()
        if self._scheduler is not None and self._recipe.scheduled_by == "step":
            self._scheduler.step()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _WithLoss(nn.Module):
    """A model and its loss as one module, so that the gradients of a loss with weights of its own are averaged, too."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs: Inputs, target: Any) -> torch.Tensor:
        """The loss of a batch."""
        return self.loss(call(self.model, inputs), target)


class _Ring:
    """What a ring all-reduce over an emulated link takes: twice all but one part through each port, hop by hop."""

    def __init__(self, context: RankContext, link: Link, throttle: Throttle) -> None:
        self.group, self._link, self._ranks, self._throttle = context.group, link, context.size, throttle
        self._busy_until = 0.0

    def end(self, size: int) -> float:
        """When the all-reduce of ``size`` bytes that begins now ends, behind those before it.

        It begins when a slower device would have computed what is to be summed.
        """
        self._throttle.catch_up()
        hops = 2 * (self._ranks - 1)
        takes = hops * (size / self._ranks / self._link.bandwidth + self._link.latency)
        self._busy_until = max(self._busy_until, time.perf_counter()) + takes
        return self._busy_until

    def sleep_until(self, moment: float) -> None:
        """Wait for the link, which is no work and must not count as a slower device's."""
        with self._throttle.pause():
            sleep_until(moment)


def _over_link(ring: _Ring, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients over the ranks, as late as the emulated link would have it."""
    buffer = bucket.buffer()
    end = ring.end(buffer.numel() * buffer.element_size())
    buffer.div_(dist.get_world_size(ring.group))
    summed = dist.all_reduce(buffer, group=ring.group, async_op=True).get_future()

    def wait(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        ring.sleep_until(end)
        return done.value()[0]

    found: torch.futures.Future[torch.Tensor] = summed.then(wait)
    return found


# DistributedDataParallel compares the annotations themselves, which here would be text.
_over_link.__annotations__.update(bucket=dist.GradBucket, **{"return": torch.futures.Future[torch.Tensor]})  # type: ignore[attr-defined]
