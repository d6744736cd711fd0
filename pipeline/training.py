"""Train a model over the devices of a cluster: from a model and a data set to the trained model and its account."""

from __future__ import annotations

import logging
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
from pipeline.checkpoint import Description, check_checkpoint, write_weights
from pipeline.cluster.deployment import local_cluster
from pipeline.cluster.devices import Member, discover
from pipeline.cluster.processes import check_loader_processes
from pipeline.compiled import without_compiler
from pipeline.data.batches import shapes_of
from pipeline.data.loading import check_data, check_length, check_loader, is_stream, length_of, validation_options
from pipeline.errors import InputError
from pipeline.graph.copies import copied, take_over
from pipeline.graph.operations import Graph
from pipeline.graph.trace import trace
from pipeline.html import table
from pipeline.plan.checks import check_calibration, check_plan
from pipeline.plan.fitting import Room, check_memory, is_scarce
from pipeline.plan.plan import STRATEGIES, Plan, Strategy
from pipeline.plan.planner import plan_graph
from pipeline.plan.strategies import Shares
from pipeline.progress import Progress, StepsShown, both
from pipeline.results.contracts import describe
from pipeline.run.batches import order
from pipeline.run.callbacks import Callback
from pipeline.run.given import warn_of_slow_numbers, with_all_weights
from pipeline.run.groups import ParameterGroups, check_loss, named_groups
from pipeline.run.launch import SGD, OnProgress, example_batch, held_memory, room_for, run_plan
from pipeline.run.metrics import Metric, check_metrics
from pipeline.run.recipe import CrossEntropy, Loss, OptimizerFactory, Recipe, SchedulerFactory, check_recipe
from pipeline.run.timeline import merged_losses, timing_dataset
from pipeline.run.worker import Account

_LOG = logging.getLogger(__name__)
_LARGE_PROCESS = 2 * 2**30
"""No process of a worker holds so many bytes without a network: about 300 MiB are usual."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What ``fit`` gives back."""

    model: nn.Module
    """The trained model on the CPU; the one that was given is left as it was."""
    history: xr.Dataset
    """``loss(step)``, and ``accuracy(epoch)`` or other metrics by epoch where there were validation images."""
    timing: xr.Dataset
    """``step_time(step)`` in s, the timeline of the last steps by instruction and device, ``peak_memory(device)``."""
    plan: Plan
    calibration: xr.Dataset | None
    """What the plan was made from, where it was made now."""
    callbacks: tuple[Callback, ...]
    """As they ended."""
    loss: Loss
    """What was trained by: where it is a module with weights or buffers of its own, a copy with what became of them."""

    def _repr_html_(self) -> str:
        """The result in a notebook: how the training went, and by which plan."""
        losses = self.history.loss.values
        last = {name: one for name, one in self.history.items() if "epoch" in one.dims}
        rows = [
            ("model", type(self.model).__name__),
            ("steps", f"{len(losses)}, {float(self.timing.step_time.median()):.3g} s each (median)"),
            ("loss", f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last"),
            *((str(name), f"{float(values[-1]):.4g} after {values.size} epochs") for name, values in last.items()),
        ]
        return table("Training", ["", ""], rows) + self.plan._repr_html_()


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
    metrics: Mapping[str, Metric] | None = None,
    monitor: str | None = None,
    loader: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    calibration: xr.Dataset | None = None,
    cache: str | Path | None = None,
    shares: Shares | None = None,
    plan: Plan | None = None,
    label: str | None = None,
    on_progress: OnProgress | None = None,
    progress: bool | Progress | None = None,
    network: str | None = None,
    graph: Graph | None = None,
) -> FitResult:
    """Train ``model`` on ``dataset`` over the devices of ``client``, with the result that one device would give.

    ``dataset`` gives pairs of an image ``(C, H, W)`` and a label. For a model of several inputs it gives a tuple or a
    dictionary of tensors in place of the image; labels may be nested. A stream (``IterableDataset``) needs a length or
    ``max_steps``. ``loader`` are options of torch's ``DataLoader``, samplers among them; a ``batch_sampler`` decides
    instead of ``batch_size`` and ``shuffle``. All random numbers follow from ``seed``, as in a plain loop.

    Without a client, a local cluster of this machine's devices is used; ``members`` limits the run to some devices of
    the cluster. ``batch_size`` counts the images of a step over all devices. ``optimizer`` makes an optimiser from
    parameters, and must update element by element (SGD, Adam and the like), as devices update shards. ``loss``
    (cross-entropy by default) averages over a batch; weights of its own are trained, too. ``clip_norm`` and
    ``clip_value`` limit the gradients of the model. ``validation`` images are classified after each epoch, and
    ``metrics`` tell how well (the accuracy by default): functions of output and target that return a sum and a count,
    or a mean over the batch. ``monitor`` names the one that ``ReduceLROnPlateau`` follows instead of the mean training
    loss.

    The devices are calibrated first, in seconds, unless a ``calibration`` or ``shares`` (fractions per device, or
    kernels per layer and device) are given, or a whole ``plan`` for these devices and ``batch_size``, which then
    decides instead of ``strategy``: a calibration beside it only tells what the processes hold. ``cache`` is a folder
    in which calibrations are kept and looked for. ``checkpoint`` is a file for the trained weights: a ``.safetensors``
    file, or under any other name one for ``torch.load(..., weights_only=True)``. ``label`` names the run on the
    dashboard. ``progress`` shows on standard error what is being done, how fast and how long it will take: True in any
    case, False never, None only on a terminal. ``network`` is the name of the model as the command line takes it, which
    the checkpoint then carries, so that ``predict`` can make it again; what the data set says of its classes and its
    images it carries in any case. ``graph`` is that of the model for such images, where it is known.

    Raises ``InputError`` for input that cannot work, before anything runs, and ``RunError`` when a run fails.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy '{strategy}' is unknown; the strategies are {', '.join(STRATEGIES)}")
    options = dict(loader or {})
    check_data(dataset)
    check_length(dataset, options, batch_size, epochs, max_steps)
    check_loader(dataset, options, batch_size)
    given, model = model, without_compiler(model)
    recipe = Recipe(
        loss=CrossEntropy() if loss is None else loss, optimizer=optimizer,
        groups=named_groups(parameter_groups, given, loss), scheduler=scheduler, scheduled_by=scheduled_by,
        clip_norm=clip_norm, clip_value=clip_value, accumulate=accumulate, monitor=monitor,
    )  # fmt: skip
    check_recipe(recipe)
    check_loss(model, recipe.loss)
    _check_validation(validation, options, batch_size)
    check_metrics(metrics, monitor, validates=validation is not None)
    if plan is not None and plan.batch_size != batch_size:
        raise InputError(f"the plan is for batch size {plan.batch_size}, not {batch_size}: plan again, or use that")
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    indices: list[list[list[Any]]] = []
    if not is_stream(dataset):
        indices = order(
            dataset, options, batch_size=batch_size, epochs=epochs, max_steps=max_steps, shuffle=shuffle, seed=seed
        )
        if options.get("batch_sampler") is not None and plan is None:
            batch_size = max(len(batch) for epoch in indices for batch in epoch)
    example = example_batch(dataset, collate=options.get("collate_fn"), indices=_first(indices, options))
    model = with_all_weights(model, example, seed)
    name = network or label or type(given).__name__
    graph = graph or _captured(model, example, progress, name)
    for part in graph.opaque:
        _LOG.warning("runs as it is, on one device: %s", part)
    with _cluster(client) as connected, _shown(progress, f"prepare {name}") as shown:
        chosen = tuple(members or discover(connected))
        check_loader_processes(connected, chosen, options)
        warn_of_slow_numbers(model, connected, chosen)
        labels, itemsize = [member.device.label for member in chosen], graph.dtype.itemsize
        if plan is not None:
            check_plan(plan, graph, labels)
        if calibration is not None:
            check_calibration(calibration, graph, labels)
        elif plan is None and shares is None and strategy not in ("ddp", "equal") and len(chosen) > 1:
            shown.begin(f"calibrate {name}")
            calibration = calibrate(
                model, example, connected, members=chosen, batch_size=batch_size, cache=cache, graph=graph,
                on_progress=shown,
            )  # fmt: skip
            shown.begin(f"plan {name}")
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
        shown.begin(f"train {name}")
        steps = StepsShown(shown, f"train {name}", [[len(batch) for batch in epoch] for epoch in indices])
        accounts = run_plan(
            connected, chosen, plan, graph, model, dataset,
            validation=validation, recipe=recipe, loader=options, callbacks=callbacks, metrics=metrics,
            indices=indices, stream=(epochs, max_steps), shapes=shapes_of(example), seed=seed,
            label=label or f"{plan.strategy} {type(model).__name__}", on_progress=both(steps, on_progress),
        )  # fmt: skip
    trained = copied(model).cpu()
    assert accounts[0].weights is not None
    take_over(trained, accounts[0].weights)
    if checkpoint is not None:
        write_weights(trained.state_dict(), Path(checkpoint), Description.of(dataset, network, example))
    return FitResult(
        model=trained,
        history=_history(accounts),
        timing=timing_dataset(graph, plan, batch_size, accounts),
        plan=plan,
        calibration=calibration,
        callbacks=accounts[0].callbacks,
        loss=_trained_loss(recipe.loss, accounts[0]),
    )


def _trained_loss(loss: Loss, master: Account) -> Loss:
    """The loss with what became of its weights and buffers; the one that was given stays as it was."""
    if not master.loss or not isinstance(loss, nn.Module):
        return loss
    trained = copied(loss).cpu()
    trained.load_state_dict(master.loss)
    return trained


def _first(indices: Sequence[Sequence[Sequence[Any]]], options: Mapping[str, Any]) -> Sequence[Any] | None:
    """The first samples that a sampler names; without one the first of the data set will do, in whatever order."""
    by_sampler = options.get("sampler") is not None or options.get("batch_sampler") is not None
    return indices[0][0] if by_sampler else None


def _check_validation(validation: Dataset[Any] | None, options: Mapping[str, Any], batch_size: int) -> None:
    """Raise ``InputError`` for validation images that cannot be loaded."""
    if validation is None:
        return
    check_data(validation, "validation")
    own = validation_options(options, validation)
    check_loader(validation, own, batch_size)
    if length_of(validation) is None and not is_stream(validation):
        raise InputError(f"the validation data set {type(validation).__name__} has no length: give it a __len__")
    example_batch(validation, collate=own.get("collate_fn"))


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


def _captured(model: nn.Module, example: Any, progress: bool | Progress | None, name: str) -> Graph:
    with _shown(progress, f"capture {name}"):
        return trace(model, example)


@contextmanager
def _shown(progress: bool | Progress | None, title: str) -> Iterator[Progress]:
    """The progress that was given, from now on under this title, or one of our own for the length of the block."""
    if isinstance(progress, Progress):
        progress.begin(title)
        yield progress
        return
    with Progress(title, shown=progress) as own:
        yield own


@contextmanager
def _cluster(client: Client | None) -> Iterator[Client]:
    if client is not None:
        yield client
        return
    with local_cluster() as own:
        yield own


def _history(accounts: Sequence[Account]) -> xr.Dataset:
    """Loss of every step and metrics of every epoch."""
    losses = merged_losses(accounts)
    history = xr.Dataset({"loss": ("step", losses)}, coords={"step": np.arange(len(losses))})
    for name, values in accounts[0].metrics.items():
        history[name] = ("epoch", np.array(values))
        history.coords["epoch"] = np.arange(1, len(values) + 1)
    return describe(history)
