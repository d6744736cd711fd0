"""How parameters are trained: loss, optimiser, its groups, schedule and clipping, the same on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pipeline.cluster.rank import RankContext
from pipeline.errors import InputError, first_line
from pipeline.plan.memory import SGD_STATES
from pipeline.run.groups import NamedGroup, grouped, loss_parameters
from pipeline.run.parameters import Parameters

Loss = Callable[[Any, Any], torch.Tensor]
OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]
"""Makes a learning-rate scheduler, such as ``functools.partial(StepLR, step_size=30)``."""


class CrossEntropy(nn.CrossEntropyLoss):
    """torch's, for class indices of any whole numbers: its own takes only some kinds of them."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """The mean over a batch."""
        is_index = not target.is_floating_point() and not target.is_complex()
        return super().forward(input, target.long() if is_index else target)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every rank has to know to train its part of the parameters."""

    loss: Loss
    optimizer: OptimizerFactory
    groups: tuple[NamedGroup, ...] | None = None
    scheduler: SchedulerFactory | None = None
    scheduled_by: str = "epoch"
    """``epoch`` or ``step``: when the scheduler goes on."""
    clip_norm: float | None = None
    """Largest norm of all gradients of the model together."""
    clip_value: float | None = None
    """Largest absolute value of an element of a gradient."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one update."""
    monitor: str | None = None
    """The metric that a schedule follows; None for the mean training loss."""

    def on(self, device: torch.device) -> Recipe:
        """The recipe with the loss's own tensors, such as weights of classes, on a device."""
        return replace(self, loss=copy.deepcopy(self.loss).to(device)) if isinstance(self.loss, nn.Module) else self


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A batch's place among those whose gradients are averaged for one update."""

    first: bool = True
    last: bool = True
    weight: float = 1.0
    """How much its loss counts."""


class Updater:
    """The optimiser of one rank's parameters, and what goes with it."""

    def __init__(self, recipe: Recipe, parameters: Parameters, context: RankContext) -> None:
        self._recipe, self._parameters, self._context = recipe, parameters, context
        self._loss = recipe.loss if context.rank == 0 else None  # the master alone works it out, and trains its weights
        self._of_loss = loss_parameters(self._loss)
        groups = grouped(recipe.groups, parameters.trained, parameters.home, self._of_loss)
        self._optimizer = recipe.optimizer(groups) if _holds(groups) else None
        self._scheduler = None
        if self._optimizer is not None and recipe.scheduler is not None:
            self._scheduler = recipe.scheduler(self._optimizer)

    def clip(self) -> None:
        """Limit the gradients as torch's ``clip_grad_norm_`` and ``clip_grad_value_`` would those of the whole model.

        Every rank must call this, as the norm is over all of them.
        """
        gradients = [one.grad for one in self._parameters.trained if one.grad is not None]
        if self._recipe.clip_norm is not None:
            counted = [one.grad for one in self._parameters.counted if one.grad is not None]
            squares = torch.tensor(sum(float(one.double().square().sum()) for one in counted), dtype=torch.float64)
            if self._context.group is not None:
                dist.all_reduce(squares, group=self._context.group)
            scale = min(1.0, self._recipe.clip_norm / (float(squares.sqrt()) + 1e-6))
            if scale < 1:
                for one in gradients:
                    one.mul_(scale)
        if self._recipe.clip_value is not None:
            for one in gradients:
                one.clamp_(-self._recipe.clip_value, self._recipe.clip_value)

    def step(self) -> None:
        """Update the parameters, and go on in a schedule by steps."""
        if self._optimizer is None:
            return
        self._optimizer.step()
        for one in self._of_loss.values():
            one.grad = None
        if self._scheduler is not None and self._recipe.scheduled_by == "step":
            self._scheduler.step()

    @property
    def trains_loss(self) -> bool:
        """Whether weights of the loss are trained here."""
        return bool(self._of_loss)

    def loss_state(self) -> dict[str, torch.Tensor] | None:
        """The state dict of a loss that is a module, on the master."""
        return state_of(self._loss)

    def end_epoch(self, value: float | None) -> None:
        """Go on in a schedule by epochs; the master gives the ``value`` of the epoch, which some schedules go by.

        Every rank must call this.
        """
        if self._recipe.scheduler is None or self._recipe.scheduled_by != "epoch":
            return
        followed = from_master(value, self._context)
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(followed)
        elif self._scheduler is not None:
            self._scheduler.step()


def from_master(value: float | None, context: RankContext) -> float:
    """The number that the master gives, on every rank."""
    told = torch.tensor(0.0 if value is None else value, dtype=torch.float64)
    if context.group is not None:
        dist.broadcast(told, 0, group=context.group)
    return float(told)


def state_of(loss: Any) -> dict[str, torch.Tensor] | None:
    """The state dict of a loss that is a module, as copies on the CPU."""
    if not isinstance(loss, nn.Module):
        return None
    return {name: tensor.detach().cpu().clone() for name, tensor in loss.state_dict().items()}


def _holds(groups: list[Any]) -> bool:
    return any(not isinstance(group, dict) or group["params"] for group in groups)


def check_recipe(recipe: Recipe) -> None:
    """Raise ``InputError`` for a recipe that could not give the result of one device.

    An optimiser must update element by element: one that is given a weight in two parts has to end where one that is
    given the whole ends, which is tried on a few numbers.
    """
    for name, value in (("clip_norm", recipe.clip_norm), ("clip_value", recipe.clip_value)):
        if value is not None and not value > 0:
            raise InputError(f"{name} {value} must be above 0")
    if recipe.accumulate < 1:
        raise InputError(f"accumulate {recipe.accumulate} must be at least 1 batch")
    if recipe.scheduled_by not in ("epoch", "step"):
        raise InputError(f"scheduled_by '{recipe.scheduled_by}' must be epoch or step")
    if isinstance(recipe.loss, type):
        raise InputError(
            f"the loss is the class {recipe.loss.__name__}: give an object of it, {recipe.loss.__name__}()"
        )
    try:
        whole, parts = _trial(recipe.optimizer, 1), _trial(recipe.optimizer, 2)
    except Exception as error:
        raise InputError(f"the optimiser cannot be used: {first_line(error)}") from error
    if not torch.allclose(whole, parts, rtol=1e-9, atol=1e-12):
        raise InputError(
            f"the optimiser {_name(recipe.optimizer)} mixes elements of a weight, and devices hold parts of weights; "
            "use one that updates element by element, such as SGD, Adam, AdamW, RMSprop or Adagrad"
        )
    _check_scheduler(recipe)


def _check_scheduler(recipe: Recipe) -> None:
    """Make the optimiser and its scheduler once, with a small weight for each group."""
    made: list[Any] = [nn.Parameter(torch.zeros(1))]
    if recipe.groups is not None:
        made = [{**group.options, "params": [nn.Parameter(torch.zeros(1))]} for group in recipe.groups]
    try:
        optimizer = recipe.optimizer(made)
    except Exception as error:
        raise InputError(f"the optimiser cannot be used with these groups: {first_line(error)}") from error
    if recipe.scheduler is None:
        return
    try:
        scheduler = recipe.scheduler(optimizer)
    except Exception as error:
        raise InputError(f"the scheduler cannot be used: {first_line(error)}") from error
    if not isinstance(scheduler, ReduceLROnPlateau):
        return
    if recipe.scheduled_by == "step":
        raise InputError("ReduceLROnPlateau goes by the loss of an epoch: it needs scheduled_by='epoch'")
    if scheduler.mode == "max" and recipe.monitor in (None, "loss"):
        raise InputError(
            "ReduceLROnPlateau of mode='max' would follow the training loss, which is to fall: give "
            "monitor='accuracy', or another metric that is to rise"
        )


def _trial(optimizer: OptimizerFactory, ranks: int) -> torch.Tensor:
    """Where a few steps on two weights lead of which each of some ranks has a part, and an optimiser of its own."""
    generator = torch.Generator().manual_seed(0)
    wholes = torch.randn(2, 4, 6, dtype=torch.float64, generator=generator)
    weights = [[nn.Parameter(one.chunk(ranks)[rank].clone()) for one in wholes] for rank in range(ranks)]
    updates = [optimizer(own) for own in weights]
    for _ in range(3):
        gradients = torch.randn(2, 4, 6, dtype=torch.float64, generator=generator)
        for rank, own in enumerate(weights):
            for weight, gradient in zip(own, gradients, strict=True):
                weight.grad = gradient.chunk(ranks)[rank].clone()
        for update in updates:
            update.step()
    return torch.cat([weight.detach() for index in range(2) for weight in (own[index] for own in weights)])


def states_of(optimizer: OptimizerFactory) -> int:
    """How many numbers an optimiser keeps for each of a weight, found by a step on a small one.

    Of one that fails, or does not tell what it keeps, the usual number.
    """
    weight = nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.ones_like(weight)
    try:
        update = optimizer([weight])
        update.step()
        kept = update.state[weight].values()
    except Exception:  # noqa: BLE001 - a run with it tells what is wrong, if anything is: a step is all it needs
        return SGD_STATES
    return sum(isinstance(one, torch.Tensor) and one.shape == weight.shape for one in kept)


def _name(factory: Any) -> str:
    function = getattr(factory, "func", factory)
    return str(getattr(function, "__name__", type(function).__name__))
