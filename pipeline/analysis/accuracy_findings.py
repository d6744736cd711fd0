"""What the learning curves show, in sentences whose every number is read from the store."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pipeline.analysis.wording import listed


def accuracy_finding(accuracy: xr.Dataset) -> str:
    """The largest differences from one device, then the final accuracies."""
    final, sentences = accuracy["accuracy"].isel(epoch=-1), []
    if "single" in accuracy["strategy"].values and accuracy.sizes["strategy"] > 1:
        reference, others = accuracy.sel(strategy="single"), accuracy.drop_sel(strategy="single")
        apart = 100 * np.abs(others["accuracy"] - reference["accuracy"]).max().item()
        loss = (np.abs(others["loss"] - reference["loss"]) / np.abs(reference["loss"])).max().item()
        sentences.append(
            f"Split and single accuracy differ by at most {apart:.3g} percentage points in any epoch, their training "
            f"losses by at most {loss:.1e} of the loss in any step."
        )
    reached = ", ".join(f"``{s}`` {final.sel(strategy=s).item():.2%}" for s in map(str, final["strategy"].values))
    sentences.append(f"After epoch {accuracy['epoch'].values[-1]} on ``{accuracy.attrs['data']}``: {reached}.")
    return listed(sentences, "")
