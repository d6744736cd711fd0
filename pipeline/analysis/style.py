"""One look for all figures: colours, marks and hatches by meaning, a canvas with title and source, saving.

Colours follow Okabe and Ito and differ in lightness as well; wherever two things share a panel they also differ in
marker or hatch, so that every figure can be read in greyscale and with any colour vision.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter

from pipeline.results.contracts import NOISY

INK, MUTED, FAINT = "#1f2328", "#5d656f", "#e4e7eb"
FLAGGED = f"* IQR / median > {NOISY:g}"
"""What a subtitle says where `statistics.flags` marks cells."""


class Look(NamedTuple):
    """How one thing is drawn wherever it appears."""

    color: str
    marker: str = "o"
    hatch: str = ""


STRATEGIES: dict[str, Look] = {
    "single": Look("#8a9199", "D"),
    "ddp": Look("#e8a100", "s", "...."),
    "equal": Look("#7cc4ec", "v", "////"),
    "paper": Look("#c9461a", "^", "\\\\\\\\"),
    "kernel": Look("#00508f", "o"),
    "batch": Look("#009e73", "P", "xxxx"),
    "auto": Look("#141414", "X"),
}
ACTIVITIES: dict[str, Look] = {
    "forward": Look("#12476b"),
    "backward": Look("#5b9bc7"),
    "update": Look("#7a4b8f", hatch="...."),
    "compute": Look("#12476b"),
    "exchange": Look("#f0a43c", hatch="/////"),
    "idle": Look("#eceef1"),
}
_SEQUENCE = (
    Look("#9ecae1", "o"),
    Look("#4f9ccb", "s"),
    Look("#1c6cae", "^"),
    Look("#083d7a", "D"),
    Look("#041f40", "v"),
)

_SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#aab1ba",
    "axes.linewidth": 0.8,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.5,
    "hatch.linewidth": 0.7,
    "hatch.color": "#ffffff",
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
}
_HEADER_IN, _LEGEND_IN, _FOOTER_IN = 0.72, 0.3, 0.32
_LEGEND_SIZES = ((1.5, 8.5), (1.0, 8.5), (0.9, 7.8), (0.7, 7.2), (0.5, 6.5))
"""Space between the entries, in letters, and size of the letters, in points, as they are tried."""


@contextmanager
def style() -> Iterator[None]:
    """Within it every figure is drawn in the project's style, whatever the reader's own settings."""
    with mpl.rc_context(), mpl.rc_context(_SETTINGS):
        yield


def strategy_look(name: str) -> Look:
    """The look of a strategy; an unknown one is drawn in muted grey."""
    return STRATEGIES.get(name, Look(MUTED, "*"))


def step_of_sequence(position: int, count: int) -> Look:
    """The look of one of `count` ordered values (batch sizes), light to dark."""
    chosen = np.linspace(0 if count > 3 else 1, len(_SEQUENCE) - 1, max(count, 1)).round().astype(int)
    return _SEQUENCE[chosen[position]] if count > 1 else _SEQUENCE[2]


def canvas(
    rows: int,
    columns: int,
    *,
    title: str,
    subtitle: str,
    source: str,
    panel: tuple[float, float],
    width: float | None = None,
    **subplots: Any,
) -> tuple[Figure, npt.NDArray[Any]]:
    """A figure of `rows` x `columns` axes, `panel` inches each, with header, room for a legend and the source below."""
    size = (max(width or 0, columns * panel[0] + 0.3), rows * panel[1] + _HEADER_IN + _LEGEND_IN + _FOOTER_IN)
    figure = Figure(figsize=size, layout="constrained")
    top, bottom = (_HEADER_IN + _LEGEND_IN) / size[1], _FOOTER_IN / size[1]
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0.012, bottom, 0.976, 1 - top - bottom), wspace=0.03, hspace=0.06)  # type: ignore[call-arg]
    left = 0.12 / size[0]
    figure.text(left, 1 - 0.12 / size[1], title, size=13, weight="bold", va="top")
    below = figure.text(left, 1 - 0.41 / size[1], subtitle, size=9, color=MUTED, va="top")
    room = 0.98 * figure.bbox.width / max(below.get_window_extent().width, 1)
    below.set_fontsize(9 * min(room, 1))
    figure.text(left, 0.09 / size[1], source, size=6.5, color=MUTED, va="bottom")
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    return figure, axes


def legend(figure: Figure, handles: Iterable[Artist]) -> None:
    """One legend for the whole figure, in a line below the subtitle: as wide as it may be, as small as it must be."""
    handles = list(handles)
    width, height = figure.get_size_inches()
    place = (0.02 / width, 1 - (_HEADER_IN - 0.1) / height)
    for spacing, size in _LEGEND_SIZES:
        drawn = figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=place, ncols=len(handles), borderpad=0.3, fontsize=size,
            columnspacing=spacing,
        )  # fmt: skip
        if drawn.get_window_extent().width <= 0.99 * figure.bbox.width:
            return
        if (spacing, size) != _LEGEND_SIZES[-1]:
            drawn.remove()


def whisker(axis: Axes, x: float, y: float, low: float, high: float, capsize: float) -> None:
    """The quartiles of a bar along it, edged in white so that they show on a dark one too."""
    drawn = axis.errorbar(
        x, y, xerr=[[x - low], [high - x]], color=INK, elinewidth=1, capsize=capsize, capthick=1, zorder=3
    )
    for line in (*drawn.lines[1], *drawn.lines[2]):
        line.set_path_effects([withStroke(linewidth=2.2, foreground="white")])


def plain_logarithmic(axis: Axis) -> None:
    """Label the powers of ten of an axis as numbers, and what lies between only within two decades."""
    axis.set_major_formatter("{x:g}")
    low, high = sorted(axis.get_view_interval())
    few = high < 100 * low
    axis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}" if few and f"{x:e}"[0] in "235" else ""))


def patch(look: Look, label: str) -> Patch:
    """A legend entry for bars of a look."""
    return Patch(facecolor=look.color, hatch=look.hatch, edgecolor="white", linewidth=0, label=label)


def nothing(title: str, why: str, source: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure, axes = canvas(1, 1, title=title, subtitle="", source=source, panel=(6.5, 1.2))
    axes[0, 0].set_axis_off()
    axes[0, 0].text(0.5, 0.5, why, ha="center", va="center", color=MUTED, size=10)
    return figure


def source_line(dataset: xr.Dataset, store: str) -> str:
    """Where the numbers of a figure come from, from the attributes of their store."""
    attributes = dataset.attrs
    known = [f"Data: {store}"] + [str(attributes[name]) for name in ("hardware", "data") if name in attributes]
    if "code_version" in attributes:
        known.append(f"code {attributes['code_version']}")
    if "created" in attributes:
        known.append(str(attributes["created"])[:10])
    return "  ·  ".join(known)


def is_emulated(labels: Iterable[object]) -> bool:
    """Whether a device, or a set, among the labels is slowed down on purpose."""
    return any("@" in str(label) for label in labels)


def emulation_note(labels: Iterable[object]) -> str:
    """What to add to a title or subtitle when devices are emulated; '' when none is."""
    return "@: emulated, at that fraction of full speed" if is_emulated(labels) else ""


def emulated_marks_note(labels: Iterable[object]) -> str:
    """The same where the marks of a figure do not name their devices."""
    return "some devices emulated" if is_emulated(labels) else ""


def described(grid: xr.Dataset) -> dict[str, float]:
    """GFLOP/s of the devices of a simulated grid that are not there, by label, as its configuration assumes them."""
    assumed = json.loads(str(grid.attrs.get("configuration", "{}"))).get("described", {})
    return {str(label): float(speed) for label, speed in assumed.items()}


def described_note(grid: xr.Dataset, labels: Iterable[str]) -> str:
    """What to add to a subtitle when devices of these labels are described; '' when none is."""
    assumed = {label: speed for label, speed in described(grid).items() if label in set(labels)}
    return ", ".join(f"{label} described: {speed:,.0f} GFLOP/s assumed" for label, speed in assumed.items())


def subtitle(*parts: str) -> str:
    """The parts that are not empty, in one line."""
    return "  ·  ".join(part for part in parts if part)


def time_scale(seconds: Sequence[float] | npt.NDArray[np.float64]) -> tuple[float, str]:
    """Factor and unit that make the times of an axis readable."""
    finite = np.asarray(seconds, float)
    finite = finite[np.isfinite(finite)]
    return (1.0, "s") if finite.size and finite.max() >= 1 else (1e3, "ms")


def only_left(axes: npt.NDArray[Any]) -> None:
    """Keep the y labels of the first column only."""
    for axis in axes[:, 1:].flat:
        axis.set_ylabel("")
        axis.tick_params(labelleft=False)


def unmeasured(axis: Axes, network: str) -> None:
    """Say in a panel that its network was not measured there."""
    axis.set_title(network)
    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=MUTED)
    axis.set_axis_off()


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write `stem`.svg and `stem`.png; the same data give the same files."""
    paths = stem.with_suffix(".svg"), stem.with_suffix(".png")
    # A salt of its own keeps the ids of several figures apart when they stand in one page.
    with style(), mpl.rc_context({"svg.hashsalt": stem.name}):
        figure.savefig(paths[0], metadata={"Date": None})
        figure.set_layout_engine("none")  # it has found where everything goes, and would search again
        figure.savefig(paths[1], dpi=160, metadata={"Software": None})
    return paths
