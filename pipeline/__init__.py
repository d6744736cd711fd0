"""Train one CNN on all the machines you have.

The kernels of each convolutional layer are split over unequal CPU and GPU devices in proportion to their calibrated
throughput, forward and backward, with the result that one device would give (after arXiv 1712.02546).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.calibration.measure import calibrate
    from pipeline.cluster.deployment import connect, local_cluster
    from pipeline.cluster.devices import Device
    from pipeline.errors import InputError, PipelineError, RunError
    from pipeline.inference import evaluate, predict
    from pipeline.plan.files import read_plan, write_plan
    from pipeline.plan.plan import Plan
    from pipeline.plan.planner import make_plan
    from pipeline.simulation.step import simulate
    from pipeline.training import FitResult, fit

_HOMES = {
    "Device": "pipeline.cluster.devices",
    "FitResult": "pipeline.training",
    "InputError": "pipeline.errors",
    "PipelineError": "pipeline.errors",
    "Plan": "pipeline.plan.plan",
    "RunError": "pipeline.errors",
    "calibrate": "pipeline.calibration.measure",
    "connect": "pipeline.cluster.deployment",
    "evaluate": "pipeline.inference",
    "fit": "pipeline.training",
    "local_cluster": "pipeline.cluster.deployment",
    "make_plan": "pipeline.plan.planner",
    "predict": "pipeline.inference",
    "read_plan": "pipeline.plan.files",
    "simulate": "pipeline.simulation.step",
    "write_plan": "pipeline.plan.files",
}
__all__ = [
    "Device", "FitResult", "InputError", "PipelineError", "Plan", "RunError",
    "calibrate", "connect", "evaluate", "fit", "local_cluster", "make_plan", "predict", "read_plan", "simulate",
    "write_plan",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Loaded on first use: torch and Dask take seconds to import, and `--help` needs neither.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
