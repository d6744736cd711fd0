"""Sizes of memory in words, such as `24GiB`."""

from __future__ import annotations

import re

MEMORY_SIZE = r"\d+(?:\.\d+)?(?:MiB|GiB)"
"""The pattern of a size."""
MIB = 2**20
_BYTES = {"MiB": MIB, "GiB": 2**30}


def parse_memory_size(text: str) -> int | None:
    """The bytes that `text` says, in whole MiB; None if it is no size."""
    if re.fullmatch(MEMORY_SIZE, text) is None:
        return None
    return round(float(text[:-3]) * _BYTES[text[-3:]] / MIB) * MIB
