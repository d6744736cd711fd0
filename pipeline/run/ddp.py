"""What users would pick instead: torch's DistributedDataParallel with equal parts of the batch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.cluster.gang import RankContext
from pipeline.run.clock import Clock
from pipeline.run.emulation import Throttle
from pipeline.run.execution import Loss, OptimizerFactory

INSTRUCTIONS = (("forward", "compute", "forward"), ("backward", "compute", "backward"), ("update", "update", "update"))
"""Name, kind and phase of what a step of ``ddp`` consists of; its all-reduce runs within the backward pass."""


class DataParallel:
    """One rank of DistributedDataParallel: the whole model, fed with its part of each batch."""

    def __init__(self, context: RankContext, model: nn.Module, loss: Loss, optimizer: OptimizerFactory) -> None:
        self.context, self.device = context, context.torch_device
        self.model = model.to(self.device)
        self.throttle = Throttle(context.device)
        ids = [self.device.index] if self.device.type == "cuda" else None
        self._parallel = DistributedDataParallel(self.model, device_ids=ids) if context.size > 1 else self.model
        self._loss = loss
        self._optimizer = optimizer([p for p in self._parallel.parameters() if p.requires_grad])
        self.dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())

    def train_step(self, part: float, x_BCHW: torch.Tensor, y_B: torch.Tensor, clock: Clock) -> float:
        """One step on this rank's images, which are ``part`` of the whole batch; the mean loss over them.

        DistributedDataParallel averages gradients over ranks. Where the batch does not divide evenly the loss is
        weighted, so that every image still counts the same.
        """
        self._parallel.train()
        self._optimizer.zero_grad()
        x_BCHW, y_B = x_BCHW.to(self.device, self.dtype), y_B.to(self.device)
        with clock.instruction(0), self.throttle.work():
            loss = self._loss(self._parallel(x_BCHW), y_B)
            self._synchronise()
        with clock.instruction(1), self.throttle.work():
            (loss * (part * self.context.size)).backward()
            self._synchronise()
        with clock.instruction(2), self.throttle.work():
            self._optimizer.step()
            self._synchronise()
        return float(loss.detach())

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
