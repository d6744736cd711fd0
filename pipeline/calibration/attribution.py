"""What the probes take longer than predicted, laid to numbers that make the prediction true.

How many times as long computations take, how much longer exchanges with the master, of activations between all ranks,
and of the moments of batch normalisation take for each second of computing before them, what a byte of gradients costs
``batch`` and ``ddp``, and what a step takes beside its instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import scipy.optimize
import xarray as xr
from numpy.typing import NDArray

from pipeline.calibration.probes import PROBES, Probing, busy_in, strategy_of, sums
from pipeline.plan.costs import Costs, Shared
from pipeline.plan.data_parallel import part_seconds
from pipeline.plan.instructions import COMPANIES, Company, Exchange
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.prediction import predict_step, predict_timeline
from pipeline.plan.program import Program, compile_program

_TELLS: dict[str, Company] = {"paper": "master", "kernel": "everyone", "batch without sums": "moments"}
"""Which waiting each tells of, in the order in which they are looked at."""
_STRETCHED: dict[Shared, str] = {"M": "single", "K": "kernel", "B": "batch without sums", "ddp": "ddp without sums"}
"""Which tells how long computations take."""
_STRETCH = 0.5, 2.0
_MOST_GROWTH, _MOST_S_PER_BYTE, _LITTLE = 2.0, 1e-8, 1e-3
"""Between these, or a little of the most and the most, the values are looked for."""
_SAME_S = 1e-9
"""Times that differ by less do not depend on the value."""


def fitted(calibration: xr.Dataset, task: Probing) -> xr.Dataset:
    """``calibration`` with what makes its probes true: how much longer computations, exchanges, sums and steps take.

    What a probe says nothing of, as its plan has no such exchange, stays as it is; where ``ddp`` was not tried, what
    holds for ``batch`` counts.
    """
    steps, stretch = _Steps(task), calibration.stretch.copy(deep=True)
    typical, busy = _lower_median(calibration.probe_step_time), _lower_median(calibration.probe_busy_time)
    took = {probe: float(typical.sel(probe=probe)) for probe in steps.probes}
    took = {probe: seconds for probe, seconds in took.items() if np.isfinite(seconds)}
    before = Costs.of(calibration)
    kinds = ["gpu" if str(label).startswith("gpu") else "cpu" for label in calibration.device_label.values]
    for layout, probe in _STRETCHED.items():
        if probe in took:
            stretch.loc[{"layout": layout}] = _stretch(steps, before, probe, busy.sel(probe=probe).values, kinds)
    if len(kinds) == 1:  # which has but one way to train
        stretch[:] = stretch.sel(layout="M")
    elif "ddp" not in took:  # as its images are shared out, too
        stretch.loc[{"layout": "ddp"}] = stretch.sel(layout="B").values
    costs = Costs.of(calibration.assign(stretch=stretch))
    beginning = max(took["single"] - steps.seconds("single", costs), 0.0) if "single" in took else 0.0
    costs = replace(costs, beginning=np.full(costs.devices, beginning))
    growth = calibration.turn_growth.copy(deep=True)
    for probe, company in _TELLS.items():
        value = _growth(steps, costs, probe, company, took[probe]) if probe in took else None
        if value is not None:
            growth.loc[{"company": company}] = value
            costs = _growing(costs, company, value)
    summing = _per_byte(steps, costs, "batch", "summing", took) or 0.0
    reducing = _per_byte(steps, costs, "ddp", "reducing", took) if "ddp" in took else summing
    return calibration.assign(
        stretch=stretch,
        turn_growth=growth,
        summing_time=summing,
        reducing_time=reducing or 0.0,
        beginning_time=beginning,
    )


def _stretch(
    steps: _Steps, costs: Costs, probe: str, busy: NDArray[np.float64], kinds: Sequence[str]
) -> NDArray[np.float64]:
    """How many times as long as by itself each device computes if they are so ``busy`` in a probe, (device) in s.

    One number for all devices of a kind: of one by itself, shares of a few kernels or images tell too little. So each
    counts by how much it does in its time.
    """
    speeds = costs.throughputs(steps.images)
    least, most = (np.full_like(costs.stretch, one) for one in _STRETCH)
    early, late = (steps.busy(probe, replace(costs, stretch=one)) for one in (least, most))
    known = (late - early > _SAME_S) & np.isfinite(busy)  # who computes nothing tells nothing
    found = np.ones(costs.devices)
    for kind in set(kinds):
        alike = np.array([one == kind for one in kinds])
        if (alike & known).any():
            before, after, was = (one[alike & known] @ speeds[alike & known] for one in (early, late, busy))
            found[alike] = np.interp((was - before) / (after - before), (0.0, 1.0), _STRETCH)
    return found


def _lower_median(repeated: xr.DataArray) -> xr.DataArray:
    """The median of the repetitions, of two the lower: what disturbs a step only makes it longer."""
    ascending = np.sort(repeated.transpose(..., "repetition").values, axis=-1)  # NaN at the end
    middle = np.maximum(np.isfinite(ascending).sum(axis=-1, keepdims=True) - 1, 0) // 2
    found = repeated.isel(repetition=0, drop=True)
    return found.copy(data=np.take_along_axis(ascending, middle, axis=-1)[..., 0])


def _growth(steps: _Steps, costs: Costs, probe: str, company: Company, took: float) -> float | None:
    """How much waiting of ``company`` makes ``probe`` take so long in s; None if it has nothing to do with it."""

    def late(value: float) -> float:
        return steps.seconds(probe, _growing(costs, company, value)) - took

    return _root(late, _MOST_GROWTH)


def _per_byte(
    steps: _Steps, costs: Costs, probe: str, name: Literal["summing", "reducing"], took: Mapping[str, float]
) -> float | None:
    """How many s a byte of sums costs if they add to a step what they did; None if there are none.

    What they add counts, as whatever else was predicted wrong is in both.
    """
    if probe not in took:
        return None
    without = f"{probe} without sums"
    total = steps.seconds(without, costs) + took[probe] - took[without]

    def late(value: float) -> float:
        slower: dict[str, Any] = {name: np.full(costs.devices, value)}
        return steps.seconds(probe, replace(costs, **slower)) - total

    return _root(late, _MOST_S_PER_BYTE)


def _root(late: Callable[[float], float], most: float) -> float | None:
    """Where ``late`` changes its sign between a little of ``most`` and it, or its nearer end; None if it is level."""
    least = _LITTLE * most
    early, latest = late(least), late(most)
    if latest - early <= _SAME_S:
        return None
    if early >= 0:
        return least
    return most if latest <= 0 else float(scipy.optimize.brentq(late, least, most, rtol=1e-2))


def _growing(costs: Costs, company: Company, value: float) -> Costs:
    growth = costs.turn_growth.copy()
    growth[:, COMPANIES.index(company)] = value
    return replace(costs, turn_growth=growth)


class _Steps:
    """What the steps of a probing should take."""

    def __init__(self, task: Probing) -> None:
        self._task = task
        self._programs: dict[Strategy, Program] = {
            name: compile_program(task.graph, plan, task.images) for name, plan in task.plans.items() if name != "ddp"
        }

    @property
    def images(self) -> int:
        """Of each step."""
        return self._task.images

    @property
    def probes(self) -> tuple[str, ...]:
        """Those of the ``PROBES`` that are taken."""
        return tuple(one for one in PROBES if strategy_of(one) in self._task.plans)

    def plan(self, probe: str) -> Plan:
        """What is trained."""
        return self._task.plans[strategy_of(probe)]

    def seconds(self, probe: str, costs: Costs) -> float:
        """The predicted time of one step in s."""
        if probe == "ddp":
            task, standing = self._task, _standing(costs)
            plan = self.plan(probe)
            return float(predict_step(task.graph, plan, standing, batch_size=task.images, itemsize=task.itemsize)[0])
        if strategy_of(probe) == "ddp":
            return float((costs.beginning + self.busy(probe, costs)).max())
        return float(np.nanmax(self._timeline(probe, costs)[1]))

    def busy(self, probe: str, costs: Costs) -> NDArray[np.float64]:
        """How long each device should be busy with what the strategy shares out, (device) in s; NaN for no part."""
        if strategy_of(probe) == "ddp":
            whole: NDArray[np.float64] = part_seconds(costs, self._task.images).sum(axis=1)
            return whole
        program, timeline_IR2 = self._timeline(probe, costs)
        found = np.full(costs.devices, np.nan)
        found[list(self.plan(probe).devices)] = busy_in(self.plan(probe), program, timeline_IR2)
        return found

    def _timeline(self, probe: str, costs: Costs) -> tuple[Program, NDArray[np.float64]]:
        graph, plan, program = self._task.graph, self.plan(probe), self._programs[strategy_of(probe)]
        if sums(probe):
            left = program.backward
        else:
            left = tuple(one for one in program.backward if not isinstance(one, Exchange) or one.moves != "gradients")
        standing = _standing(costs).only(plan.devices)
        program = replace(program, backward=left)
        return program, predict_timeline(graph, plan, program, standing, itemsize=self._task.itemsize)[0]


def _standing(costs: Costs) -> Costs:
    """As if updates took no time: probes have none."""
    return replace(costs, update=np.zeros(costs.devices), update_overhead=np.zeros(costs.devices))
