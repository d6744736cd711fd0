"""What came of one network, as a record that a file keeps, and the verdict on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Record = dict[str, Any]
"""A line of the results: `network`, `package`, `version`, `verdict` and, as far as it came, `parameters`,
`capture_s`, `opaque`, `sentence`, and by strategy `difference`, `moved` and `split`."""

TOLERANCE = 1e-9
AMPLIFIED = 100
"""As many times what one rounding of the first weights does is still rounding."""
VERDICTS = ("exact", "rounding", "wrong", "crashed", "refused")
"""From good to bad; the first two are right, and a refusal is where the network may be refused."""


def judge(apart: Mapping[str, float], moved: Mapping[str, float]) -> str:
    """The verdict on differences of losses and tensors, given those of loops whose first weights were moved.

    Each tensor is held against what rounding does to itself: one that rounding leaves alone excuses no other.
    """
    beyond = {name: value for name, value in apart.items() if not value <= TOLERANCE}
    if not beyond:
        return "exact"
    if all(value <= AMPLIFIED * moved.get(name, 0.0) and math.isfinite(value) for name, value in beyond.items()):
        return "rounding"
    return "wrong"


def worst(apart: Mapping[str, float]) -> float:
    """The largest difference."""
    return max(apart.values(), default=0.0)


def farthest(apart: Mapping[str, float]) -> str:
    """The loss or tensor that is farthest off."""
    return max(apart, key=lambda name: apart[name], default="")


def worse(verdicts: Sequence[str]) -> str:
    """The worst of several."""
    return max(verdicts, key=VERDICTS.index)


def is_fault(record: Record, refusal: str) -> bool:
    """Whether a record is of something to put right; `refusal` says why the network may be refused, if it may."""
    return record["verdict"] not in ("exact", "rounding") and not (record["verdict"] == "refused" and refusal)
