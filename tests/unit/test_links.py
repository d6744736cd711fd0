"""Links in words."""

from __future__ import annotations

import time

import pytest

from pipeline.errors import InputError
from pipeline.links import Link, canonical_link, parse_link
from pipeline.run.link_emulation import Ports


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loopback", None),
        ("1Gbit/s", Link(0.0, 1.25e8)),
        ("100Mbit/s+5ms", Link(5e-3, 1.25e7)),
        ("10 gbit/s + 50us", Link(5e-5, 1.25e9)),
        ("8bit/s+1s", Link(1.0, 1.0)),
    ],
)
def test_a_link_is_a_rate_and_a_delay(text: str, expected: Link | None) -> None:
    found = parse_link(text)
    assert found == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("text", ["", "fast", "0Gbit/s", "-1Gbit/s", "1Gbit/s+5", "1Gbyte/s", "1.2.3Gbit/s"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"link '.*' is unknown: write loopback, or a rate"):
        parse_link(text)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("LOOPBACK", "loopback"),
        ("1 Gbit/s", "1Gbit/s"),
        ("1000Mbit/s + 0.1ms", "1Gbit/s+100us"),
        ("2500kbit/s+1500us", "2.5Mbit/s+1.5ms"),
        ("3bit/s", "3bit/s"),
    ],
)
def test_a_link_has_one_way_to_be_written(text: str, canonical: str) -> None:
    assert canonical_link(text) == canonical
    assert canonical_link(canonical) == canonical
    assert parse_link(canonical) == pytest.approx(parse_link(text))


def test_a_port_receives_in_the_order_of_arrival_whatever_is_taken_up_first() -> None:
    """Three messages of 1 s each, under way one after the other: who looks at the last one first has all then."""
    ports = Ports(Link(latency=0.0, bandwidth=1e9))
    now = time.perf_counter()
    assert ports._booked(now + 2, 1.0) == pytest.approx(now + 3)
    assert ports._booked(now, 1.0) == pytest.approx(now + 1)
    assert ports._booked(now + 1, 1.0) == pytest.approx(now + 2)
    assert ports._booked(now + 0.5, 1.0) == pytest.approx(now + 4)  # from another sender: it waits for its turn
