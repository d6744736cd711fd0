"""How findings are worded: names of devices, and sentences as reStructuredText of which the first is the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import xarray as xr

from pipeline.analysis.selection import rank_labels
from pipeline.analysis.style import described, is_emulated

_BULLET = "- "


def named(device_set: str) -> str:
    """A device or set as a literal, `(emulated)` behind it where it is."""
    # As a literal, or reStructuredText takes what surrounds an @ for an address.
    return f"``{device_set}``" + (" (emulated)" if is_emulated([device_set]) else "")


def assumed(simulation: xr.Dataset, label: str, device_set: str) -> str:
    """As `named`, with the speed that is assumed of the device `label` where it is only described."""
    speed = described(simulation).get(label)
    return named(device_set) + ("" if speed is None else f" (described, {speed:,.0f} GFLOP/s assumed)")


def rank_in_words(cell: xr.Dataset, rank: int, name: Callable[[str], str] = str) -> str:
    """A rank of the cell's plan as the device that it is, its label by ``name``, where that can be told."""
    label = rank_labels(cell)[rank]
    return f"device {rank}, {name(label)}" if label else unnamed(rank)


def unnamed(rank: int) -> str:
    """A rank of which cannot be told which device it was."""
    return f"rank {rank} of the plan"


def counted(number: int, thing: str) -> str:
    """So many of the thing, as in '1 cell' or '2 cells'."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def listed(sentences: Iterable[str], otherwise: str) -> str:
    """A finding: the sentences, the answer first, or `otherwise` where there is none."""
    found = list(sentences)
    if len(found) > 1:
        return "\n".join(f"{_BULLET}{sentence}" for sentence in found) + "\n"
    return (found[0] if found else otherwise) + "\n"


def sentences_of(finding: str) -> list[str]:
    """The sentences of a finding, the answer first."""
    return [line.removeprefix(_BULLET) for line in finding.splitlines() if line.strip()]
