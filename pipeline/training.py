"""Train a model over the devices of a cluster: from a model and a data set to the trained model and its account."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from distributed import Client
from torch import nn
from torch.utils.data import Dataset

from pipeline.calibration.measure import calibrate
from pipeline.checkpoint import check_checkpoint, write_weights
from pipeline.cluster.deployment import local_cluster
from pipeline.cluster.devices import Member, discover
from pipeline.errors import InputError
from pipeline.graph.copies import copied, take_over, unwrapped
from pipeline.graph.trace import Graph, trace
from pipeline.plan.checks import check_calibration, check_plan
from pipeline.plan.fitting import Room, check_memory, is_scarce
from pipeline.plan.plan import STRATEGIES, Plan, Strategy
from pipeline.plan.planner import plan_graph
from pipeline.plan.strategies import Shares
from pipeline.results.contracts import describe
from pipeline.run.batches import batch_indices
from pipeline.run.callbacks import Callback
from pipeline.run.launch import SGD, OnProgress, example_batch, held_memory, room_for, run_plan
from pipeline.run.parameters import ParameterGroups
from pipeline.run.recipe import Loss, OptimizerFactory, Recipe, SchedulerFactory, check_recipe
from pipeline.run.timeline import merged_losses, timing_dataset
from pipeline.run.worker import Account

_LARGE_PROCESS = 2 * 2**30
"""No process of a worker holds so many bytes without a network: about 300 MiB are usual."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What ``fit`` gives back."""

    model: nn.Module
    """The trained model on the CPU; the one that was given is left as it was."""
    history: xr.Dataset
    """``loss(step)``, and ``accuracy(epoch)`` where there were validation images."""
    timing: xr.Dataset
    """``step_time(step)`` in s, the timeline of the last steps by instruction and device, ``peak_memory(device)``."""
    plan: Plan
    calibration: xr.Dataset | None
    """What the plan was made from, where it was made now."""
    callbacks: tuple[Callback, ...]
    """As they ended."""


def fit(
    model: nn.Module,
    dataset: Dataset[Any],
    client: Client | None = None,
    *,
    members: Sequence[Member] | None = None,
    batch_size: int = 64,
    epochs: int = 1,
    max_steps: int | None = None,
    strategy: Strategy = "auto",
    optimizer: OptimizerFactory = SGD,
    parameter_groups: ParameterGroups | None = None,
    scheduler: SchedulerFactory | None = None,
    scheduled_by: Literal["epoch", "step"] = "epoch",
    clip_norm: float | None = None,
    clip_value: float | None = None,
    accumulate: int = 1,
    loss: Loss | None = None,
    shuffle: bool = True,
    seed: int = 0,
    validation: Dataset[Any] | None = None,
    loader: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    calibration: xr.Dataset | None = None,
    cache: str | Path | None = None,
    shares: Shares | None = None,
    plan: Plan | None = None,
    label: str | None = None,
    on_progress: OnProgress | None = None,
) -> FitResult:
    """Train ``model`` on ``dataset`` over the devices of ``client``, with the result that one device would give.

    ``dataset`` gives pairs of an image ``(C, H, W)`` and a label. Without a client, a local cluster of this machine's
    devices is used; ``members`` limits the run to some devices of the cluster. ``batch_size`` counts the images of a
    step over all devices. ``optimizer`` makes an optimiser from parameters, and must update element by element (SGD,
    Adam and the like), as devices update shards. ``loss`` (cross-entropy by default) averages over a batch.
    ``validation`` images are classified after each epoch. The devices are calibrated first, in seconds, unless a
    ``calibration`` or ``shares`` (fractions per device, or kernels per layer and device) are given, or a whole ``plan``
    for these devices and ``batch_size``, which then decides instead of ``strategy``: a calibration beside it only tells
    what the processes hold. ``cache`` is a folder in which calibrations are kept and looked for. ``checkpoint`` is a
    file for the trained weights: a ``.safetensors`` file, or under any other name one for ``torch.load(...,
    weights_only=True)``. ``label`` names the run on the dashboard.

    Raises ``InputError`` for input that cannot work, before anything runs, and ``RunError`` when a run fails.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy '{strategy}' is unknown; the strategies are {', '.join(STRATEGIES)}")
    recipe = Recipe(
        loss=loss or nn.CrossEntropyLoss(), optimizer=optimizer, groups=parameter_groups, scheduler=scheduler,
        scheduled_by=scheduled_by, clip_norm=clip_norm, clip_value=clip_value, accumulate=accumulate,
    )  # fmt: skip
    check_recipe(recipe)
    if plan is not None and plan.batch_size != batch_size:
        raise InputError(f"the plan is for batch size {plan.batch_size}, not {batch_size}: plan again, or use that")
    images = _checked_length(dataset, batch_size, epochs, max_steps)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    model = unwrapped(model)
    example_BCHW = example_batch(dataset)
    graph = trace(model, example_BCHW)
    with _cluster(client) as connected:
        chosen = tuple(members or discover(connected))
        labels, itemsize = [member.device.label for member in chosen], graph.dtype.itemsize
        if plan is not None:
            check_plan(plan, graph, labels)
        if calibration is not None:
            check_calibration(calibration, graph, labels)
        elif plan is None and shares is None and strategy not in ("ddp", "equal") and len(chosen) > 1:
            calibration = calibrate(model, example_BCHW, connected, members=chosen, batch_size=batch_size, cache=cache)
        room = room_for(chosen, dataset, validation=validation, optimizer=optimizer)
        used = range(len(chosen)) if plan is None else plan.devices
        room = _beside_processes(room, connected, chosen, used, calibration, graph, batch_size, itemsize)
        if plan is not None:
            check_memory(graph, plan, room, itemsize=itemsize, decided=True)
            calibration = None  # the plan was not made from it now
        else:
            plan = plan_graph(
                graph,
                calibration,
                batch_size=batch_size,
                strategy=strategy,
                labels=labels,
                shares=shares,
                itemsize=itemsize,
                room=room,
            )
        indices = batch_indices(images, batch_size, epochs=epochs, max_steps=max_steps, shuffle=shuffle, seed=seed)
        accounts = run_plan(
            connected, chosen, plan, graph, model, dataset,
            validation=validation, recipe=recipe, loader=loader, callbacks=callbacks, indices=indices, seed=seed,
            label=label or f"{plan.strategy} {type(model).__name__}", on_progress=on_progress,
        )  # fmt: skip
    trained = copied(model).cpu()
    assert accounts[0].weights is not None
    take_over(trained, accounts[0].weights)
    if checkpoint is not None:
        write_weights(trained.state_dict(), Path(checkpoint))
    return FitResult(
        model=trained,
        history=_history(accounts),
        timing=timing_dataset(graph, plan, batch_size, accounts),
        plan=plan,
        calibration=calibration,
        callbacks=accounts[0].callbacks,
    )


def _beside_processes(
    room: Room,
    client: Client,
    members: Sequence[Member],
    used: Sequence[int],
    calibration: xr.Dataset | None,
    graph: Graph,
    batch_size: int,
    itemsize: int,
) -> Room:
    """The ``room`` of the members without what their processes hold, as a calibration has measured.

    Without one those that may be ``used`` are asked, unless they have plenty in any case.
    """
    if calibration is not None:
        return room.beside(calibration.process_memory.values)
    least = room.beside(_LARGE_PROCESS)
    if not is_scarce(graph, least.only(used), batch_size, itemsize=itemsize):
        return least
    held = np.zeros(len(members))
    held[list(used)] = held_memory(client, [members[device] for device in used])
    return room.beside(held)


def _checked_length(dataset: Dataset[Any], batch_size: int, epochs: int, max_steps: int | None) -> int:
    images = len(dataset)  # type: ignore[arg-type]
    for name, value in (("batch size", batch_size), ("epochs", epochs), ("max_steps", max_steps)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    if batch_size > images:
        raise InputError(f"batch size {batch_size} is larger than the data set, which has {images} images")
    return images


@contextmanager
def _cluster(client: Client | None) -> Iterator[Client]:
    if client is not None:
        yield client
        return
    with local_cluster() as own:
        yield own


def _history(accounts: Sequence[Account]) -> xr.Dataset:
    """Loss of every step and accuracy of every epoch."""
    losses = merged_losses(accounts)
    history = xr.Dataset({"loss": ("step", losses)}, coords={"step": np.arange(len(losses))})
    if accounts[0].accuracies:
        history["accuracy"] = ("epoch", np.array(accounts[0].accuracies))
        history.coords["epoch"] = np.arange(1, len(accounts[0].accuracies) + 1)
    return describe(history)
