"""What the figure of unequal devices shows, in sentences whose every number is read from the stores."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pipeline.analysis.unequal_figure import NOTHING, gains, lost, payback
from pipeline.analysis.wording import listed, named


def unequal_finding(timing: xr.Dataset, calibration: xr.Dataset, miscalibration: xr.Dataset) -> str:
    """What calibrated shares gain on each pair of devices, when the calibration has paid, what a wrong one loses."""
    found, sentences = gains(timing), []
    if found is not None:
        paid = payback(found, calibration)
        pairs = [str(one) for one in found["device_set"].values]
        sentences = [_most(found), *(_pair(found.sel(device_set=one), paid.sel(device_set=one)) for one in pairs)]
    losses = lost(miscalibration)
    if losses is not None:
        sentences += filter(None, (_wrong(losses.sel(strategy=name)) for name in losses["strategy"].values))
    return listed(sentences, NOTHING)


def _most(found: xr.Dataset) -> str:
    """The largest gain of the first strategy, which differs from `equal` in its shares alone where it was measured."""
    first = found.isel(strategy=0)
    best = first.isel(device_set=int(np.nanargmax(first["gain"].values)))
    return (
        f"{found.attrs['network']}, batch {found.attrs['batch_size']}: with calibrated shares "
        f"(``{best['strategy'].item()}``) a step is up to {best['gain'].item():.2f} times as fast as with equal ones "
        f"(95 % interval {_interval(best)}), on {named(best['device_set'].item())}."
    )


def _interval(cell: xr.Dataset) -> str:
    return f"{cell['low'].item():.2f} to {cell['high'].item():.2f}"


def _pair(cells: xr.Dataset, paid: xr.Dataset) -> str:
    """On one pair of devices the gain of every strategy, and after how many steps the calibration has paid."""
    told, after = [], []
    for name in map(str, cells["strategy"].values):
        cell = cells.sel(strategy=name)
        if cell["gain"].notnull():
            told.append(f"``{name}`` {cell['gain'].item():.2f} ({_interval(cell)})")
            steps = paid["steps"].sel(strategy=name).item()
            after.append(f"``{name}`` {f'after {int(np.ceil(steps)):,} steps' if np.isfinite(steps) else 'never'}")
    seconds = paid["seconds"].item()
    cost = f"; the calibration took {seconds:.3g} s, which is saved with {', '.join(after)}"
    return (
        f"On {named(cells['device_set'].item())}, calibrated speeds 1:{cells['ratio'].item():.2g}, times as fast as "
        f"with equal shares: {', '.join(told)}{cost if np.isfinite(seconds) else ''}."
    )


def _wrong(losses: xr.Dataset) -> str:
    """What one strategy's step takes longer at each error of the calibration."""
    told = []
    for error in map(float, losses["error"].values):
        cell = losses.sel(error=error)
        if error and cell["loss"].notnull():
            told.append(
                f"{cell['loss'].item():+.0%} ({cell['low'].item():+.0%} to {cell['high'].item():+.0%}, simulated "
                f"{cell['simulated'].item():+.0%}) at {error:+.0%}"
            )
    if not told:
        return ""
    return (
        f"Where the time of ``{losses.attrs['device']}`` is wrong in the calibration, {losses.attrs['network']}, batch "
        f"{losses.attrs['batch_size']}, on {named(losses.attrs['device_set'])}: the step of "
        f"``{losses['strategy'].item()}`` changes by {', '.join(told)}."
    )
