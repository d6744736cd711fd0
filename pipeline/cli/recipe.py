"""How `train` updates the weights: the optimiser and its learning rate over time, by name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.run.recipe import OptimizerFactory

OPTIMIZERS = {"sgd": 0.01, "adam": 0.001, "adamw": 0.001, "rmsprop": 0.01, "adagrad": 0.01}
"""With the learning rate that each has unless one is given."""
_CLASSES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop", "adagrad": "Adagrad"}
_MOMENTUM = {"sgd": 0.9, "rmsprop": 0.0}
SCHEDULES = ("none", "step", "cosine")

OptimizerOption = Annotated[str, typer.Option("--optimizer", help="sgd, adam, adamw, rmsprop or adagrad.")]
LearningRateOption = Annotated[
    float | None,
    typer.Option(
        "--learning-rate",
        min=0,
        help="At the beginning; if not given 0.001 for adam and adamw, 0.01 for the others.",
        show_default=False,
    ),
]
MomentumOption = Annotated[
    float | None,
    typer.Option("--momentum", min=0, help="Of sgd (0.9 if not given) and rmsprop (0).", show_default=False),
]
WeightDecayOption = Annotated[
    float | None,
    typer.Option("--weight-decay", min=0, help="0 if not given, 0.01 for adamw.", show_default=False),
]
ScheduleOption = Annotated[
    str,
    typer.Option(
        "--schedule",
        help="How the learning rate goes on: none (it stays), step (times --gamma every --step-size epochs) or cosine "
        "(down to 0 at the last step).",
    ),
]
StepSizeOption = Annotated[
    int | None,
    typer.Option(
        "--step-size", min=1, help="Epochs between two steps, a third of all if not given.", show_default=False
    ),
]
GammaOption = Annotated[
    float | None, typer.Option("--gamma", min=0, help="Factor of each step, 0.1 if not given.", show_default=False)
]


def optimizer_named(
    name: str, learning_rate: float | None = None, momentum: float | None = None, weight_decay: float | None = None
) -> OptimizerFactory:
    """A factory of the optimiser, which travels to the workers; what is None is as usual for it.

    Raises:
        InputError: There is no optimiser of that name, or it has no momentum.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer '{name}' is unknown; the optimizers are {', '.join(OPTIMIZERS)}")
    if momentum is not None and name not in _MOMENTUM:
        raise InputError(f"optimizer {name} takes no --momentum, only {' and '.join(_MOMENTUM)} do")
    import torch

    options = {"lr": OPTIMIZERS[name] if learning_rate is None else learning_rate}
    if name in _MOMENTUM:
        options["momentum"] = _MOMENTUM[name] if momentum is None else momentum
    if weight_decay is not None:
        options["weight_decay"] = weight_decay
    return partial(getattr(torch.optim, _CLASSES[name]), **options)


def check_schedule(name: str, step_size: int | None = None, gamma: float | None = None) -> None:
    """Raise InputError where there is no schedule of that name, or it does not take these options."""
    if name not in SCHEDULES:
        raise InputError(f"schedule '{name}' is unknown; the schedules are {', '.join(SCHEDULES)}")
    for option, value in (("--step-size", step_size), ("--gamma", gamma)):
        if value is not None and name != "step":
            raise InputError(f"{option} belongs to --schedule step, not to {name}")


def schedule_named(
    name: str, *, epochs: int, updates: int, step_size: int | None = None, gamma: float | None = None
) -> dict[str, Any]:
    """The arguments of ``fit`` for a schedule over so many epochs, or updates of the weights.

    Raises:
        InputError: As ``check_schedule``.
    """
    check_schedule(name, step_size, gamma)
    if name == "none":
        return {}
    from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

    if name == "cosine":
        return {"scheduler": partial(CosineAnnealingLR, T_max=updates), "scheduled_by": "step"}
    every = -(-epochs // 3) if step_size is None else step_size
    factor = 0.1 if gamma is None else gamma
    return {"scheduler": partial(StepLR, step_size=every, gamma=factor), "scheduled_by": "epoch"}


def updates_of(images: int, batch_size: int, *, epochs: int, max_steps: int | None, accumulate: int) -> int:
    """How often a training updates the weights."""
    batches = -(-images // batch_size)
    steps = min(epochs * batches, max_steps or epochs * batches)
    whole, rest = divmod(steps, batches)
    return whole * -(-batches // accumulate) + -(-rest // accumulate)
