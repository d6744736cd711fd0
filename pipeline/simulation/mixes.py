"""Sets of devices to simulate, which need not be there: `gpu + 8 x cpu`, of calibrated or described ones."""

from __future__ import annotations

import math
import re

from pipeline.errors import InputError
from pipeline.memory_sizes import parse_memory_size

MOST_DEVICES = 1024
_TERM = re.compile(r"(?:(?P<count>\d+)\s*x\s*)?(?P<name>\S+)")


def memory_of(name: str) -> float:
    """What a described device such as `gpu[24GiB]` may hold in bytes; without end where it does not say.

    Raises `InputError` for brackets with anything else in them.
    """
    _, bracket, size = name.partition("[")
    if not bracket:
        return math.inf
    memory = parse_memory_size(size[:-1]) if size.endswith("]") else None
    if memory is None:
        raise InputError(f"device {name} is described with a memory that is no size: write such as gpu[24GiB]")
    return memory


def parse_mix(text: str) -> tuple[str, ...]:
    """The devices of a set such as `gpu + 8 x cpu`, by name.

    Raises:
        InputError: A term is no device with a count of at least 1 before it, or there are more than 1,024.
    """
    found: list[str] = []
    for term in re.split(r"\s*\+\s*", text.strip()):
        match = _TERM.fullmatch(term)
        if match is None or int(match["count"] or 1) < 1:
            raise InputError(f"device set '{text}' is wrong at '{term}': write devices such as gpu + 8 x cpu")
        found += [match["name"]] * int(match["count"] or 1)
    if len(found) > MOST_DEVICES:
        raise InputError(f"device set '{text}' has {len(found)} devices: at most {MOST_DEVICES} can be simulated")
    return tuple(found)
