"""What every rank of a training or timing run does, from its job to its account of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from pipeline._torchvision import Importable
from pipeline.cluster.gang import RankContext
from pipeline.cluster.randomness import leave_to_the_rank
from pipeline.data.batches import call, prepared
from pipeline.data.randomness import seed_all
from pipeline.errors import RunError
from pipeline.graph.copies import tensors_of
from pipeline.graph.operations import Graph
from pipeline.links import Link
from pipeline.plan.labels import DDP_LABELS
from pipeline.plan.plan import Plan
from pipeline.processor import stolen_seconds, usable_cores
from pipeline.run.callbacks import Callback, Epoch
from pipeline.run.clock import Clock, clock_offset
from pipeline.run.convolution_timer import ConvolutionTimer
from pipeline.run.ddp import DataParallel
from pipeline.run.execution import Execution
from pipeline.run.feeding import Fed, Feed, PartialBatches, ValidationBatches, WholeBatches
from pipeline.run.memory import current_memory, peak_memory, reset_peak_memory
from pipeline.run.metrics import Metric, Scores
from pipeline.run.parts import Parts
from pipeline.run.recipe import Recipe, Turn


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a rank needs to know; equal on all ranks but for the model and the data."""

    importable: Importable = field(default_factory=Importable)
    """Before the model, which may be torchvision's: fields are unpickled in order."""

    parts: Parts | None
    """Of the model, on the master; None elsewhere."""
    model: nn.Module | None
    """The model itself, where its own code runs: under ``ddp``, and on the master for another evaluation."""
    dataset: Dataset[Any] | None
    """On the master, and under ``ddp`` on every rank."""
    validation: Dataset[Any] | None
    """Images to classify after each epoch, on the master."""
    graph: Graph
    plan: Plan
    recipe: Recipe
    feed: Feed
    """Which samples make up which batch, and how they are loaded."""
    seed: int
    metrics: Mapping[str, Metric] | None = None
    """What is told of the validation images; None for the accuracy."""
    callbacks: tuple[Callback, ...] = ()
    """What to call after each epoch, on the master; every rank has to know whether there is something."""
    link: Link | None = None
    """The link to emulate between the ranks."""
    synchronised: bool = False
    """Whether all ranks begin each step together, as a timing needs."""
    profiled: int = 0
    """How many more steps run with a timer at every convolution."""
    keep_weights: bool = True
    """Whether the trained weights are wanted."""
    keep_gradients: bool = False
    """Whether the gradients of the last step are wanted."""
    keep_steps: int = 16
    """Of how many steps at the end the timeline is wanted."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a rank did."""

    weights: dict[str, torch.Tensor] | None
    """The parameters and buffers that the network works with, by name, from the master."""
    gradients: dict[str, torch.Tensor] | None
    """Of the last step, by parameter, from the master."""
    losses: list[float]
    """Per step: of the batch on the master, under ``ddp`` of this rank's images."""
    images: list[int]
    """Per step, how many images ``losses`` averages over."""
    metrics: dict[str, list[float]]
    """Of the validation images, by name and epoch, on the master."""
    loss: dict[str, torch.Tensor] | None
    """The state dict of a loss that is a module, from the master."""
    steps: NDArray[np.float64]
    """(step, 2): start and end in s on the clock all ranks share."""
    times: NDArray[np.float64]
    """(step, instruction, 2) of the last steps."""
    peak_memory: int
    """Most memory the rank held during the run, in bytes: resident memory, or on a GPU the allocated one."""
    stolen: float
    """Fraction of the time of its machine's cores that a host gave to other machines meanwhile."""
    convolutions: NDArray[np.float64]
    """(step) time in convolutions of the profiled steps in s."""
    callbacks: tuple[Callback, ...]
    """As they ended."""


def process_memory(context: RankContext) -> int:
    """What the process of a rank holds in bytes before it is given a network; every rank of the gang runs this."""
    layer = nn.Conv2d(3, 8, 3).to(context.torch_device)
    # What torch sets up for its operations stays in the process, as it will in training.
    layer(torch.ones(1, 3, 16, 16, device=context.torch_device)).sum().backward()
    del layer
    return current_memory(context.torch_device)


def run_rank(context: RankContext, job: Job) -> Account:
    """Train as the job says; every rank of the gang runs this.

    Raises ``RunError`` when the loss is no finite number.
    """
    reset_peak_memory(context.torch_device)
    offset = clock_offset(context)
    runner = _DataParallelRun(context, job, offset) if job.plan.strategy == "ddp" else _ProgramRun(context, job, offset)
    losses: list[float] = []
    images: list[int] = []
    metrics: dict[str, list[float]] = {}
    start, stolen, monitor = time.monotonic(), stolen_seconds(), job.recipe.monitor
    leave_to_the_rank()
    seed_all(job.seed)  # behind all that is made ready: a plain loop draws nothing for it
    for number, epoch in enumerate(runner.batches.epochs(), 1):
        began, done, seen = time.monotonic(), len(losses), 0
        for fed in epoch:
            if job.synchronised:
                context.barrier()
            with runner.clock.step():
                loss = runner.step(fed)
            if loss is not None:
                if not math.isfinite(loss):
                    raise RunError(f"the loss is {loss} at step {len(losses) + 1}; try a smaller learning rate")
                losses.append(loss)
                images.append(fed.own)
            seen += fed.size
            context.report(len(runner.clock.steps), loss=math.nan if loss is None else loss)
        trained = time.monotonic() - began
        found = runner.metrics() if job.feed.validates else {}
        for name, value in found.items():
            metrics.setdefault(name, []).append(value)
        if job.validation is not None and monitor not in (None, "loss", *found):
            raise RunError(f"monitor '{monitor}' cannot be told of these outputs and labels: give metrics of your own")
        mean = runner.mean_loss(losses[done:], images[done:])
        runner.updater.end_epoch(mean if monitor in (None, "loss") else found.get(str(monitor)))
        told = Epoch(
            number=number, loss=math.nan if mean is None else mean, accuracy=found.get("accuracy"),
            seconds=time.monotonic() - began, metrics=dict(found), images=seen, training_seconds=trained,
        )  # fmt: skip
        if job.callbacks and _ended_by(context, job.callbacks, told):
            break
    stolen = (stolen_seconds() - stolen) / (usable_cores() * (time.monotonic() - start))
    convolutions = _convolution_times(context, runner, job)
    return Account(
        weights=runner.weights() if job.keep_weights else None,
        gradients=runner.gradients() if job.keep_gradients else None,
        losses=losses,
        images=images,
        metrics=metrics,
        loss=runner.loss_state() if job.keep_weights else None,
        steps=np.array(runner.clock.steps).reshape(-1, 2),
        times=runner.clock.times,
        peak_memory=peak_memory(context.torch_device),
        stolen=stolen,
        convolutions=convolutions,
        callbacks=job.callbacks,
    )


def _ended_by(context: RankContext, callbacks: Sequence[Callback], epoch: Epoch) -> bool:
    """Tell the callbacks of the end of an epoch; whether one of them ends the training."""
    stop = torch.zeros(1)
    if context.rank == 0:
        stop += sum(bool(callback.on_epoch(epoch)) for callback in callbacks)
    if context.group is not None:
        dist.broadcast(stop, 0, group=context.group)
    return bool(stop)


class _ProgramRun:
    """A rank that executes a program; only the master has images."""

    def __init__(self, context: RankContext, job: Job, offset: float) -> None:
        self._job = job
        self._execution = Execution(context, job.parts, job.graph, job.plan, job.link)
        self._execution.prepare(job.recipe)
        assert self._execution.updater is not None
        self.updater = self._execution.updater
        full = self._execution.program(job.plan.batch_size)
        self.clock = Clock(len(full.instructions), offset=offset, keep=job.keep_steps)

        self.batches = WholeBatches(context, job.dataset, job.feed, job.recipe.accumulate)
        self._validation = ValidationBatches(context, job.validation, job.feed)

    def step(self, fed: Fed) -> float | None:
        inputs, target = fed.batch or (None, None)
        return self._execution.train_step(fed.size, inputs, target, self.clock, fed.turn)

    def mean_loss(self, losses: Sequence[float], images: Sequence[int]) -> float | None:
        """Mean over the images of an epoch; None but on the master."""
        return float(np.average(losses, weights=images)) if losses else None

    def metrics(self) -> dict[str, float]:
        """What the validation images tell; nothing but on the master."""
        scores = Scores(self._job.metrics, self._job.recipe.loss)
        self._execution.begin_evaluation(self._job.model)
        for size, batch in self._validation:
            output = self._execution.predict(size, None if batch is None else batch[0])
            if batch is not None:
                scores.add(output, batch[1], size)
        return scores.values() if self._job.validation is not None else {}

    def loss_state(self) -> dict[str, torch.Tensor] | None:
        """That of the loss, where it is a module, on the master."""
        assert self._execution.updater is not None
        return self._execution.updater.loss_state()

    def weights(self) -> dict[str, torch.Tensor] | None:
        return self._execution.gather()

    def gradients(self) -> dict[str, torch.Tensor]:
        return self._execution.parameters.gather_gradients()


class _DataParallelRun:
    """A rank under ``ddp``: it has the whole model and all the images, and takes its part of each batch."""

    def __init__(self, context: RankContext, job: Job, offset: float) -> None:
        self._context, self._job = context, job
        assert job.model is not None
        self._parallel = DataParallel(context, job.model, job.recipe, job.link)
        self.updater = self._parallel
        self.clock = Clock(len(DDP_LABELS), offset=offset, keep=job.keep_steps)

        assert job.dataset is not None
        self.batches = PartialBatches(context, job.dataset, job.feed, job.recipe.accumulate)
        self._validation = ValidationBatches(context, job.validation, job.feed, alone=True)

    def step(self, fed: Fed) -> float:
        assert fed.batch is not None
        return self._parallel.train_step(fed.own / fed.size, *fed.batch, self.clock, fed.turn)

    def mean_loss(self, losses: Sequence[float], images: Sequence[int]) -> float:
        """Mean over the images that all ranks had in an epoch."""
        sums = torch.tensor([np.dot(losses, images), sum(images)], dtype=torch.float64)
        if self._context.group is not None:
            dist.all_reduce(sums, group=self._context.group)
        return float(sums[0] / sums[1])

    def metrics(self) -> dict[str, float]:
        """What the validation images tell; nothing but on the master."""
        if self._job.validation is None:
            return {}
        scores, parallel = Scores(self._job.metrics, self._job.recipe.loss), self._parallel
        model = parallel.model.eval()
        with torch.no_grad():
            for size, batch in self._validation:
                assert batch is not None
                output = call(model, prepared(batch[0], parallel.device, parallel.dtype))
                scores.add(output, batch[1], size)
        return scores.values()

    def loss_state(self) -> dict[str, torch.Tensor] | None:
        """That of the loss, where it is a module, on the master."""
        return self._parallel.loss_state() if self._context.rank == 0 else None

    def weights(self) -> dict[str, torch.Tensor] | None:
        if self._context.rank != 0:
            return None
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors_of(self._parallel.model).items()}

    def gradients(self) -> dict[str, torch.Tensor]:
        model = self._parallel.model
        return {name: p.grad.detach().cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


def _convolution_times(context: RankContext, runner: _ProgramRun | _DataParallelRun, job: Job) -> NDArray[np.float64]:
    """Time in convolutions, forward and backward, of each of the profiled steps in s, (step)."""
    times = []
    if not job.profiled:
        return np.array([])
    last = job.feed.indices[-1][-job.profiled :]
    for fed in runner.batches.epoch(last):
        timer = ConvolutionTimer(context.torch_device)
        with timer, runner.clock.step(recorded=False):
            runner.step(fed._replace(turn=Turn()))
        times.append(timer.seconds)
    return np.array(times) / context.device.speed  # the timer does not see the sleep of an emulated device
