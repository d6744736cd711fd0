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
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from pipeline._torchvision import Importable
from pipeline.cluster.gang import RankContext
from pipeline.errors import RunError
from pipeline.graph.copies import tensors_of
from pipeline.graph.trace import Graph
from pipeline.links import Link
from pipeline.plan.labels import DDP_LABELS
from pipeline.plan.plan import Plan
from pipeline.processor import stolen_seconds, usable_cores
from pipeline.run.batches import Batch, batches, part_of
from pipeline.run.callbacks import Callback, Epoch
from pipeline.run.clock import Clock, clock_offset
from pipeline.run.convolution_timer import ConvolutionTimer
from pipeline.run.ddp import DataParallel
from pipeline.run.execution import Execution
from pipeline.run.memory import current_memory, peak_memory, reset_peak_memory
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
    validation_images: int
    graph: Graph
    plan: Plan
    recipe: Recipe
    indices: list[list[list[int]]]
    """Image indices by epoch and step."""
    seed: int
    loader: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of torch's ``DataLoader``."""
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
    accuracies: list[float]
    """Per epoch, on the master."""
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
    torch.manual_seed(job.seed)
    reset_peak_memory(context.torch_device)
    offset = clock_offset(context)
    runner = _DataParallelRun(context, job, offset) if job.plan.strategy == "ddp" else _ProgramRun(context, job, offset)
    losses: list[float] = []
    images: list[int] = []
    accuracies: list[float] = []
    start, stolen = time.monotonic(), stolen_seconds()
    for number, epoch in enumerate(job.indices, 1):
        began, done = time.monotonic(), len(losses)
        turns = _turns(len(epoch), job.recipe.accumulate)
        for turn, (batch_size, batch) in zip(turns, runner.batches(epoch), strict=True):
            if job.synchronised:
                context.barrier()
            with runner.clock.step():
                loss = runner.step(batch_size, batch, turn)
            if loss is not None:
                if not math.isfinite(loss):
                    raise RunError(f"the loss is {loss} at step {len(losses) + 1}; try a smaller learning rate")
                losses.append(loss)
                images.append(runner.images(batch_size))
            context.report(len(runner.clock.steps), loss=math.nan if loss is None else loss)
        accuracy = runner.accuracy() if job.validation_images else None
        accuracies += [] if accuracy is None else [accuracy]
        mean = runner.mean_loss(losses[done:], images[done:])
        runner.updater.end_epoch(mean)
        if job.callbacks and _ended_by(context, job.callbacks, number, mean, accuracy, time.monotonic() - began):
            break
    stolen = (stolen_seconds() - stolen) / (usable_cores() * (time.monotonic() - start))
    convolutions = _convolution_times(context, runner, job)
    return Account(
        weights=runner.weights() if job.keep_weights else None,
        gradients=runner.gradients() if job.keep_gradients else None,
        losses=losses,
        images=images,
        accuracies=accuracies,
        steps=np.array(runner.clock.steps).reshape(-1, 2),
        times=runner.clock.times,
        peak_memory=peak_memory(context.torch_device),
        stolen=stolen,
        convolutions=convolutions,
        callbacks=job.callbacks,
    )


def _turns(batches: int, accumulate: int) -> list[Turn]:
    """Each batch's place among those whose gradients are averaged for one update."""
    found = []
    for index in range(batches):
        start = index - index % accumulate
        size = min(accumulate, batches - start)
        found.append(Turn(first=index == start, last=index == start + size - 1, weight=1 / size))
    return found


def _ended_by(
    context: RankContext,
    callbacks: Sequence[Callback],
    number: int,
    loss: float | None,
    accuracy: float | None,
    seconds: float,
) -> bool:
    """Tell the callbacks of the end of an epoch; whether one of them ends the training."""
    stop = torch.zeros(1)
    if context.rank == 0:
        epoch = Epoch(number=number, loss=math.nan if loss is None else loss, accuracy=accuracy, seconds=seconds)
        stop += sum(bool(callback.on_epoch(epoch)) for callback in callbacks)
    if context.group is not None:
        dist.broadcast(stop, 0, group=context.group)
    return bool(stop)


class _ProgramRun:
    """A rank that executes a program; only the master has images."""

    def __init__(self, context: RankContext, job: Job, offset: float) -> None:
        self._job = job
        self._execution = Execution(context, job.parts, job.graph, job.plan, job.link)
        self._execution.prepare(job.recipe, job.seed)
        assert self._execution.updater is not None
        self.updater = self._execution.updater
        full = self._execution.program(job.plan.batch_size)
        self.clock = Clock(len(full.instructions), offset=offset, keep=job.keep_steps)

    def batches(self, epoch: Sequence[Sequence[int]]) -> Any:
        """(images in the batch, the batch or None) for every step."""
        if self._job.dataset is None:
            return ((len(batch), None) for batch in epoch)
        return zip(map(len, epoch), batches(self._job.dataset, epoch, self._job.loader), strict=True)

    def step(self, batch_size: int, batch: Batch | None, turn: Turn) -> float | None:
        x_BCHW, y_B = batch or (None, None)
        return self._execution.train_step(batch_size, x_BCHW, y_B, self.clock, turn)

    def images(self, batch_size: int) -> int:
        """How many images of a batch the loss of this rank averages over."""
        return batch_size

    def mean_loss(self, losses: Sequence[float], images: Sequence[int]) -> float | None:
        """Mean over the images of an epoch; None but on the master."""
        return float(np.average(losses, weights=images)) if losses else None

    def accuracy(self) -> float | None:
        size, correct = len(self._job.indices[0][0]), 0
        total = self._job.validation_images
        parts = [list(range(start, min(start + size, total))) for start in range(0, total, size)]
        source: Any = ((None, None) for _ in parts)
        if self._job.validation is not None:
            source = batches(self._job.validation, parts, self._job.loader)
        self._execution.begin_evaluation(self._job.model)
        for part, (x_BCHW, y_B) in zip(parts, source, strict=True):
            output = self._execution.predict(len(part), x_BCHW)
            if output is not None and y_B is not None:
                correct += _correct(output, y_B)
        return correct / total if self._job.validation is not None else None

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

    def batches(self, epoch: Sequence[Sequence[int]]) -> Any:
        rank, ranks = self._context.rank, self._context.size
        assert self._job.dataset is not None
        # A rank without an image of a small last batch still has to take part: with one image, which counts for
        # nothing.
        mine = [part_of(rank, ranks, batch) or batch[:1] for batch in epoch]
        return zip(map(len, epoch), batches(self._job.dataset, mine, self._job.loader), strict=True)

    def step(self, batch_size: int, batch: Batch, turn: Turn) -> float:
        return self._parallel.train_step(self.images(batch_size) / batch_size, *batch, self.clock, turn)

    def images(self, batch_size: int) -> int:
        """How many images of a batch the loss of this rank averages over."""
        return len(part_of(self._context.rank, self._context.size, range(batch_size)))

    def mean_loss(self, losses: Sequence[float], images: Sequence[int]) -> float:
        """Mean over the images that all ranks had in an epoch."""
        sums = torch.tensor([np.dot(losses, images), sum(images)], dtype=torch.float64)
        if self._context.group is not None:
            dist.all_reduce(sums, group=self._context.group)
        return float(sums[0] / sums[1])

    def accuracy(self) -> float | None:
        if self._job.validation is None:
            return None
        model, correct, size = self._parallel.model.eval(), 0, len(self._job.indices[0][0])
        total = self._job.validation_images
        parts = [list(range(start, min(start + size, total))) for start in range(0, total, size)]
        with torch.no_grad():
            for x_BCHW, y_B in batches(self._job.validation, parts, self._job.loader):
                correct += _correct(model(x_BCHW.to(self._parallel.device, self._parallel.dtype)), y_B)
        return correct / total

    def weights(self) -> dict[str, torch.Tensor] | None:
        if self._context.rank != 0:
            return None
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors_of(self._parallel.model).items()}

    def gradients(self) -> dict[str, torch.Tensor]:
        model = self._parallel.model
        return {name: p.grad.detach().cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


def _correct(output: Any, y_B: torch.Tensor) -> int:
    """How many images are classified right; of several outputs the first one counts."""
    return int((pytree.tree_leaves(output)[0].argmax(1).cpu() == y_B).sum())


def _convolution_times(context: RankContext, runner: _ProgramRun | _DataParallelRun, job: Job) -> NDArray[np.float64]:
    """Time in convolutions, forward and backward, of each of the profiled steps in s, (step)."""
    times = []
    last = job.indices[-1][len(job.indices[-1]) - job.profiled :]
    for batch_size, batch in runner.batches(last):
        timer = ConvolutionTimer(context.torch_device)
        with timer, runner.clock.step(recorded=False):
            runner.step(batch_size, batch, Turn())
        times.append(timer.seconds)
    return np.array(times) / context.device.speed  # the timer does not see the sleep of an emulated device
