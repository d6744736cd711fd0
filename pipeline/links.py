"""Links between devices in words: `loopback`, the link as it is, or a rate and a delay such as `1Gbit/s+5ms`."""

from __future__ import annotations

import re
from typing import NamedTuple

from pipeline.errors import InputError

LOOPBACK = "loopback"

_PATTERN = re.compile(
    r"(?P<rate>[0-9.]+)\s*(?P<prefix>[KMGT]?)bit/s(?:\s*\+\s*(?P<delay>[0-9.]+)\s*(?P<unit>us|ms|s))?", re.IGNORECASE
)
_BITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class Link(NamedTuple):
    """What a link does to a message."""

    latency: float
    """One way, in s."""
    bandwidth: float
    """In bytes/s, of each device's port, in each direction."""


def parse_link(text: str) -> Link | None:
    """The link that `text` describes; None for `loopback`.

    Raises:
        InputError: It is neither `loopback` nor a rate above 0 with, if wanted, a delay.
    """
    if text.strip().lower() == LOOPBACK:
        return None
    match = _PATTERN.fullmatch(text.strip())
    try:
        rate = float(match["rate"]) * _BITS[match["prefix"].upper()] if match else 0.0
        delay = float(match["delay"]) * _SECONDS[match["unit"].lower()] if match and match["delay"] else 0.0
    except ValueError:
        rate, delay = 0.0, 0.0
    if rate <= 0:
        raise InputError(
            f"link '{text}' is unknown: write loopback, or a rate above 0 and if wanted a delay, such as 1Gbit/s or "
            "100Mbit/s+5ms"
        )
    return Link(latency=delay, bandwidth=rate / 8)


def canonical_link(text: str) -> str:
    """The one way to write the link that `text` describes; raises as `parse_link` does."""
    link = parse_link(text)
    if link is None:
        return LOOPBACK
    bits = link.bandwidth * 8
    prefix = next((name for name in "TGMK" if bits >= _BITS[name]), "")
    rate = f"{bits / _BITS[prefix]:.10g}{prefix if prefix != 'K' else 'k'}bit/s"
    if not link.latency:
        return rate
    unit = next((name for name in ("s", "ms") if link.latency >= _SECONDS[name]), "us")
    return f"{rate}+{link.latency / _SECONDS[unit]:.10g}{unit}"
