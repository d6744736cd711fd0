"""The figure of a confusion matrix: which class is taken for which."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from pipeline.analysis.style import INK, canvas, style, subtitle
from pipeline.analysis.wording import counted

_NUMBERS_UP_TO = 20
"""In matrices of more classes numbers would be too small to read."""
_CELL_IN = 0.42
_LETTERS_ACROSS = 2
_LEAST_IN, _MOST_IN = 3.0, 9.0


def confusion_figure(evaluated: xr.Dataset) -> Figure:
    """Of the images of each class, a row, the part that is told to be of each, a column; and how many where it fits."""
    counts_KK = evaluated["confusion"].values
    names = [str(name) for name in evaluated["class"].values]
    images = int(counts_KK.sum())
    note = subtitle(
        str(evaluated.attrs["data"]), counted(images, "image"), f"accuracy {100 * float(evaluated['accuracy']):.1f} %"
    )
    side = min(max(_CELL_IN * len(names), _LEAST_IN), _MOST_IN)
    rows_KK = counts_KK / np.maximum(counts_KK.sum(1, keepdims=True), 1)
    with style():
        figure, axes = canvas(
            1, 1, title="Confusion matrix", subtitle=note, source=f"weights {evaluated.attrs['weights']}",
            panel=(side + 1.6, side + 0.8),
        )  # fmt: skip
        axis = axes[0, 0]
        axis.grid(visible=False)
        drawn = axis.imshow(rows_KK, cmap="Blues", vmin=0, vmax=1)
        axis.set(xlabel="told class", ylabel="true class")
        turned = {"rotation": 45, "ha": "right"} if max(map(len, names)) > _LETTERS_ACROSS else {}
        axis.set_xticks(range(len(names)), names, **turned)
        axis.set_yticks(range(len(names)), names)
        figure.colorbar(drawn, ax=axis, label="part of the true class", shrink=0.8)
        if len(names) <= _NUMBERS_UP_TO:
            for (row, column), count in np.ndenumerate(counts_KK):
                color = "white" if rows_KK[row, column] > 0.5 else INK
                axis.text(column, row, str(count), ha="center", va="center", color=color, size=8)
    return figure
