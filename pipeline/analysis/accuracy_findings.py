"""What the learning curves show, in sentences whose every number is read from the store."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pipeline.analysis.learning import (
    FIRST_STEPS,
    accuracy_difference,
    control_loss_difference,
    has_single,
    loss_difference,
    rounding_bound,
    seed_spread,
    shown_strategies,
)
from pipeline.analysis.wording import listed

_BEFORE_AMPLIFIED = 10


def accuracy_finding(accuracy: xr.Dataset) -> str:
    """The difference of accuracies to `single` beside the spread over seeds; losses beside rounding; the accuracies."""
    shown, seeds = shown_strategies(accuracy), accuracy.sizes["seed"]
    if not shown:
        return "No accuracy was measured.\n"
    final = accuracy["accuracy"].isel(epoch=-1).mean("seed")
    reached = ", ".join(f"``{s}`` {final.sel(strategy=s).item():.2%}" for s in shown)
    over = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    what = f"{accuracy.attrs['network']} after epoch {accuracy['epoch'].values[-1]} on ``{accuracy.attrs['data']}``"
    compared = [_beside_seeds(accuracy), _beside_rounding(accuracy)] if has_single(accuracy) else []
    return listed([*compared, f"{what}, {over}: {reached}."], "")


def _beside_seeds(accuracy: xr.Dataset) -> str:
    apart = 100 * abs(accuracy_difference(accuracy))
    last, most, image = apart.isel(epoch=-1).max().item(), apart.max().item(), 100 / int(accuracy.attrs["test_images"])
    told = (
        f"Largest difference between single and split accuracy: {last:.2f} percentage points after the last epoch, "
        f"{most:.2f} after any (one test image is {image:.2g})."
    )
    if accuracy.sizes["seed"] < 2:
        return f"{told} A spread over seeds takes more than one seed."
    spread = 100 * seed_spread(accuracy)
    verdict = "no more than" if last <= spread.isel(epoch=-1).item() else "more than"
    return (
        f"{told} Spread of ``single`` over seeds: {spread.isel(epoch=-1).item():.2f} after the last epoch, up to "
        f"{spread.max().item():.2f} after any. Splitting changes the accuracy {verdict} another seed does."
    )


def _beside_rounding(accuracy: xr.Dataset) -> str:
    steps = min(FIRST_STEPS, accuracy.sizes["step"])
    losses, control = loss_difference(accuracy).isel(step=slice(steps)), control_loss_difference(accuracy)
    most = losses.max(["seed", "step"], skipna=False)  # a loss that is no number is no agreement
    each = ", ".join(f"``{s}`` {most.sel(strategy=s).item():.1e}" for s in map(str, most["strategy"].values))
    early, bound = losses.isel(step=slice(_BEFORE_AMPLIFIED)).max(skipna=False).item(), rounding_bound(accuracy, steps)
    verdict = "is" if most.max(skipna=False).item() <= bound else "is more than"
    return (
        f"Losses differ from those of ``single`` by at most {early:.1e} (relative) in the first "
        f"{min(_BEFORE_AMPLIFIED, steps)} steps, where float32 resolves {np.finfo(np.float32).eps:.1e}; in the first "
        f"{steps} steps by {each}. Training amplifies rounding: ``single`` itself, each initial weight moved to a "
        f"neighbouring float32 number, differs by {control.isel(step=slice(steps)).max().item():.1e}. So the "
        f"difference {verdict} what rounding makes of this training (at most {bound:.1e}, one rounding a step)."
    )
