"""Time cells of the grid: warm-up, synchronised steps, raw repetitions, and where each device spent its time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from distributed import Client
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from pipeline.cluster.devices import Member
from pipeline.errors import InputError, RunError, TooLittleMemoryError
from pipeline.graph.trace import trace
from pipeline.links import parse_link
from pipeline.plan.checks import check_calibration
from pipeline.plan.costs import Costs
from pipeline.plan.labels import instruction_labels
from pipeline.plan.link_cases import Links
from pipeline.plan.memory import predict_memory
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.planner import plan_graph, predicted_step_time
from pipeline.plan.prediction import predict_timeline
from pipeline.plan.program import compile_program
from pipeline.results.contracts import (
    CELL,
    FAILED,
    OK,
    OUT_OF_MEMORY,
    CellIndex,
    describe,
    unmeasured_cell,
    validate_cell,
)
from pipeline.results.timeline import busy_times, label_variables
from pipeline.rounds import MOST_STEPS, rounds_of
from pipeline.run.batches import batch_indices
from pipeline.run.launch import PLAIN, SGD, OnProgress, example_batch, image_bytes, room_for, run_plan
from pipeline.run.recipe import OptimizerFactory
from pipeline.run.timeline import merged_losses, stacked
from pipeline.run.worker import Account

_PROFILED_S = 10.0
"""For about so long steps are repeated in which convolutions are timed."""

Key = TypeVar("Key", bound=Hashable)


class Bench:
    """What is timed at one place of the grid: a network and a batch size, on certain devices, over a link."""

    def __init__(
        self,
        *,
        model: nn.Module,
        dataset: Dataset[Any],
        client: Client,
        members: Sequence[Member],
        network: str,
        batch_size: int,
        device_set: str,
        calibration: xr.Dataset,
        believed: xr.Dataset | None = None,
        link: str = "loopback",
        seed: int = 0,
        optimizer: OptimizerFactory = SGD,
    ) -> None:
        """``members`` are the devices of ``device_set``, which ``calibration`` measured in this order.

        A ``link`` other than loopback is emulated between them. A calibration ``believed`` in its place makes the
        plans, whose times are still predicted from ``calibration``. Raises ``InputError`` for a batch larger than the
        data set, a link that cannot be emulated between the members, or a calibration of something else.
        """
        self._images = len(dataset)  # type: ignore[arg-type]
        if batch_size > self._images:
            raise InputError(f"batch size {batch_size} is larger than the data set, which has {self._images} images")
        self._emulated = parse_link(link)
        if self._emulated is not None and (
            len({one.host for one in members}) > 1 or any(one.device.kind != "cpu" for one in members)
        ):
            raise InputError(
                f"link {link} can only be emulated between CPU devices of one host: use loopback, or only these"
            )
        self._links = None if self._emulated is None else Links.one(self._emulated)
        self._graph = trace(model, example_batch(dataset))
        self._model, self._dataset, self._client, self._members = model, dataset, client, members
        self._labels = [member.device.label for member in members]
        self._batch_size, self._seed, self._optimizer = batch_size, seed, optimizer
        self._place = functools.partial(CellIndex, network, batch_size, device_set, link)
        check_calibration(calibration, self._graph, self._labels)
        self._costs, self._planned_from = Costs.of(calibration), calibration if believed is None else believed
        self._process_memory = calibration.process_memory.values
        self._room = room_for(members, dataset, optimizer=optimizer).beside(self._process_memory)
        self._plans: dict[Strategy, Plan] = {}
        self._refusals: dict[Strategy, str] = {}

    def plan(self, strategy: Strategy) -> Plan:
        """The plan of a strategy, worked out once; raises ``TooLittleMemoryError`` where there is a ``refusal``."""
        if (reason := self.refusal(strategy)) is not None:
            raise TooLittleMemoryError(reason)
        return self._plans[strategy]

    def refusal(self, strategy: Strategy) -> str | None:
        """Why the devices cannot hold the network as a strategy splits it; None where they can."""
        if strategy not in self._plans and strategy not in self._refusals:
            try:
                self._plans[strategy] = plan_graph(
                    self._graph, self._planned_from, batch_size=self._batch_size, strategy=strategy,
                    labels=self._labels, links=self._links, room=self._room,
                )  # fmt: skip
            except TooLittleMemoryError as error:
                self._refusals[strategy] = str(error)
        return self._refusals.get(strategy)

    def predicted(self, strategy: Strategy) -> float:
        """Predicted time of one step in s, infinite where the devices cannot hold the network."""
        if self.refusal(strategy) is not None:
            return math.inf
        return predicted_step_time(self._graph, self.plan(strategy), self._costs, links=self._links)

    def time(
        self,
        strategy: Strategy,
        *,
        repetitions: int = 5,
        seconds: float = 0.0,
        warmup: int = 2,
        most: int = MOST_STEPS,
        on_progress: OnProgress | None = None,
    ) -> xr.Dataset:
        """Time ``repetitions`` training steps after ``warmup`` others, as a cell of the grid of one round.

        Short steps are timed more often, up to ``most`` times, until so many ``seconds`` are predicted to be
        timed. Of ``single`` the convolutions are timed in as many more steps as there are ``repetitions``, or in fewer
        where these are long. A run that fails or runs out of memory, or for which there is too little, gives a cell
        whose status says so. Raises ``InputError`` for repetitions below 1.
        """
        _check_clock(repetitions, seconds, warmup)
        if (reason := self.refusal(strategy)) is not None:
            return unmeasured_cell(self._place(strategy), self._labels, f"{OUT_OF_MEMORY}: {reason}")
        plan, predicted = self.plan(strategy), self.predicted(strategy)
        timed = max(repetitions, math.ceil(min(seconds / predicted, most)) if predicted > 0 else 0)
        total = warmup + timed
        try:
            accounts = run_plan(
                self._client, self._members, plan, self._graph, self._model, self._dataset,
                recipe=replace(PLAIN, optimizer=self._optimizer),
                indices=_full_batches(self._images, self._batch_size, total, self._seed), seed=self._seed,
                label=f"{strategy} {self._place(strategy).network}", link=self._emulated, synchronised=True,
                profiled=_profiled(repetitions, predicted) if strategy == "single" else 0, keep_weights=False,
                keep_steps=timed,
                on_progress=None if on_progress is None else functools.partial(_of_total, on_progress, total),
            )  # fmt: skip
        except (RunError, torch.OutOfMemoryError, MemoryError) as error:
            labels = [self._labels[device] for device in plan.devices]
            return unmeasured_cell(self._place(strategy), labels, _status(error))
        return self._cell(strategy, accounts, timed)

    def _memory(self, plan: Plan) -> NDArray[np.float64]:
        """Predicted peak memory in bytes, (rank); NaN where images are whose size is unknown."""
        needed = predict_memory(self._graph, plan, states=self._room.states)
        # The room that plans have takes images of an unknown size for none, which would be a wrong prediction.
        room = replace(self._room, images=image_bytes(self._members, self._dataset))
        found: NDArray[np.float64] = self._process_memory[list(plan.devices)] + needed + room.images_of(plan)
        return found

    def _cell(self, strategy: Strategy, accounts: Sequence[Account], repetitions: int) -> xr.Dataset:
        graph, plan = self._graph, self.plan(strategy)
        labels = instruction_labels(graph, plan, plan.batch_size)
        steps, times = stacked(accounts)
        convolution = np.full(repetitions, np.nan)
        convolution[repetitions - len(accounts[0].convolutions) :] = accounts[0].convolutions
        relative = times[-1] - steps[-1, 0]
        predicted = np.full(relative.shape, np.nan)
        if plan.strategy != "ddp":
            program, over = compile_program(graph, plan, plan.batch_size), self._links and self._links.of(plan.devices)
            predicted = predict_timeline(graph, plan, program, self._costs.only(plan.devices), links=over)[0]
        throughput = self._costs.throughputs(plan.batch_size)[list(plan.devices)]
        cell = xr.Dataset(
            {
                "step_time": ("repetition", steps[:, 1] - steps[:, 0]),
                "round": ("repetition", np.zeros(repetitions)),
                "loss": ("repetition", merged_losses(accounts)[-repetitions:]),
                "convolution_time": ("repetition", convolution),
                "predicted_step_time": self.predicted(strategy),
                "status": OK,
                "chosen": plan.strategy,
                "device_label": ("device", np.array(plan.labels, dtype=object)),
                "device_throughput": ("device", throughput),
                "share": ("device", np.array(plan.convolution_shares(graph))),
                "peak_memory": ("device", np.array([float(account.peak_memory) for account in accounts])),
                "stolen": ("device", np.array([account.stolen for account in accounts])),
                **label_variables(labels, itemsize=4),
                "instruction_start": (("instruction", "device"), relative[..., 0]),
                "instruction_end": (("instruction", "device"), relative[..., 1]),
                "predicted_start": (("instruction", "device"), predicted[..., 0]),
                "predicted_end": (("instruction", "device"), predicted[..., 1]),
                "predicted_memory": ("device", self._memory(plan)),
            },
            coords={
                **self._place(strategy)._asdict(),
                "device": np.arange(len(accounts)),
                "repetition": np.arange(repetitions),
                "instruction": np.arange(len(labels)),
            },
        )
        for name, time_DR in busy_times(labels, times, steps).items():
            cell[name] = (("device", "repetition"), time_DR)
        validate_cell(cell)
        return describe(cell)


def _profiled(repetitions: int, predicted: float) -> int:
    """In how many steps convolutions are timed, which have hardly any spread."""
    return max(1, min(repetitions, int(_PROFILED_S / max(predicted, 1e-6))))


def measure_cells(
    cells: Mapping[Key, tuple[Bench, Strategy]],
    *,
    rounds: int = 1,
    repetitions: int = 5,
    seconds: float = 0.0,
    warmup: int = 2,
    progressing: Callable[[Key], AbstractContextManager[OnProgress]] | None = None,
) -> dict[Key, xr.Dataset]:
    """Time what is to be compared in turn, once in each round, and join the rounds of each to one cell of the grid.

    A host that is slower for a while is so for all of them then, and what a launch happens upon (places in memory,
    cores) differs from round to round. The ``repetitions`` and ``seconds`` are those of all rounds together, the
    ``warmup`` that of each. Where all steps are predicted to be long, one round has to do. What comes to the very plan
    of another, as ``auto`` often does, is not timed again: its cell has the same steps. ``progressing`` shows how far a
    round of one of them has come. Raises ``InputError`` as ``Bench`` does.
    """
    if rounds < 1:
        raise InputError(f"rounds {rounds} must be at least 1")
    _check_clock(repetitions, seconds, warmup)
    shortest = min((bench.predicted(strategy) for bench, strategy in cells.values()), default=0.0)
    rounds = rounds_of(shortest, rounds, repetitions)
    as_other = {key: _first_alike(key, cells) for key in cells}
    order = [(key, one) for key, one in cells.items() if as_other[key] == key]
    found: dict[Key, list[xr.Dataset]] = {key: [] for key, _ in order}
    for following in range(rounds):
        for key, (bench, strategy) in reversed(order) if following % 2 else order:  # no one is always before another
            with nullcontext() if progressing is None else progressing(key) as on_progress:
                cell = bench.time(
                    strategy, repetitions=-(-repetitions // rounds), seconds=seconds / rounds, warmup=warmup,
                    most=-(-MOST_STEPS // rounds), on_progress=on_progress,
                )  # fmt: skip
            found[key].append(cell)
    timed = {key: joined(several) for key, several in found.items()}
    return {key: timed[key] if as_other[key] == key else _as_auto(timed[as_other[key]]) for key in cells}


def _as_auto(cell: xr.Dataset) -> xr.Dataset:
    """The cell of another strategy as that of ``auto``, which came to the same plan; convolutions are ``single``'s."""
    untold = xr.full_like(cell["convolution_time"], np.nan)
    return cell.assign_coords(strategy="auto").assign(convolution_time=untold)


def _first_alike(key: Key, cells: Mapping[Key, tuple[Bench, Strategy]]) -> Key:
    """The cell that is timed for ``key``: itself, unless ``auto`` took the plan of another at the same place."""
    bench, strategy = cells[key]
    if strategy != "auto" or bench.refusal(strategy) is not None:
        return key
    alike = (
        other for other, (place, name) in cells.items()
        if name != "auto" and place is bench and bench.refusal(name) is None and bench.plan(name) == bench.plan("auto")
    )  # fmt: skip
    return next(alike, key)


def joined(rounds: Sequence[xr.Dataset]) -> xr.Dataset:
    """One cell of all its rounds; the first that failed where one did.

    Its timeline is that of the round in the middle, by the median step; its peaks of memory are the highest.
    """
    failed = [one for one in rounds if one.status.item() != OK]
    if failed:
        return failed[0]
    order = np.argsort([float(one.step_time.median()) for one in rounds], kind="stable")
    cell = rounds[int(order[(len(order) - 1) // 2])]
    along = [name for name, variable in CELL.items() if "repetition" in variable.dims]
    together = xr.concat(
        [one[along].assign(round=one["round"] + number) for number, one in enumerate(rounds)], dim="repetition"
    )
    cell = cell.drop_dims("repetition").assign(together).assign_coords(repetition=np.arange(len(together.repetition)))
    cell["peak_memory"] = xr.concat([one.peak_memory for one in rounds], dim="all").max("all")
    cell["stolen"] = xr.concat([one.stolen for one in rounds], dim="all").mean("all")
    validate_cell(cell)
    return describe(cell)


def _check_clock(repetitions: int, seconds: float, warmup: int) -> None:
    if repetitions < 1 or warmup < 0:
        raise InputError(f"repetitions {repetitions} must be at least 1, and warm-up steps {warmup} at least 0")
    if not 0 <= seconds < math.inf:
        raise InputError(f"seconds {seconds} must be at least 0 s, and finite")


def _of_total(on_progress: OnProgress, total: int, done: int, values: dict[str, float]) -> None:
    on_progress(done, {"total": total, **values})


def _full_batches(images: int, batch_size: int, steps: int, seed: int) -> list[list[list[int]]]:
    """One epoch of ``steps`` full batches, going through the data as often as need be."""
    full = images - images % batch_size
    epochs = -(-steps * batch_size // full)
    found = batch_indices(images, batch_size, epochs=epochs + 1, max_steps=None, shuffle=True, seed=seed)
    batches = [batch for epoch in found for batch in epoch if len(batch) == batch_size]
    return [batches[:steps]]


def _status(error: BaseException) -> str:
    """The status of a cell that gave no times; memory is told apart because it answers a question of its own."""
    reason = " ".join(str(error).split())
    words = reason.lower()
    memory = any(sign in words for sign in ("out of memory", "outofmemory", "can't allocate memory", "memoryerror"))
    return f"{OUT_OF_MEMORY if memory else FAILED}: {reason}"
