"""The sizes of an exchange, worked out from the layouts, are those of its messages."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan.layouts import Layout, master, messages, partial, replicated
from pipeline.plan.traffic import taking_part, traffic

RANKS = 4


@st.composite
def layouts(draw: st.DrawFn, images: int, channels: int) -> Layout:
    kind = draw(st.sampled_from("MRPKB"))
    if kind == "M":
        return master(RANKS)
    if kind in "RP":
        flags = tuple(draw(st.lists(st.integers(0, 1), min_size=RANKS, max_size=RANKS).filter(any)))
        return (replicated if kind == "R" else partial)(flags)
    total = channels if kind == "K" else images
    marks = sorted(draw(st.lists(st.integers(0, total), min_size=RANKS - 1, max_size=RANKS - 1)))
    return Layout(kind, tuple(np.diff([0, *marks, total]).tolist()))  # type: ignore[arg-type]


@given(st.data(), st.integers(1, 7), st.integers(1, 9))
def test_traffic_is_the_sum_of_the_messages(data: st.DataObject, images: int, channels: int) -> None:
    source, target = (data.draw(layouts(images, channels)) for _ in range(2))
    listed = messages(source, target, images, channels)
    expected, count = np.zeros((RANKS, RANKS)), np.zeros((RANKS, RANKS))
    for one in listed:
        if one.source != one.target:
            expected[one.source, one.target] += one.box.size
            count[one.source, one.target] += 1
    moved = traffic(source, target, images, channels)
    np.testing.assert_array_equal(moved.matrix, expected)
    np.testing.assert_array_equal(moved.sent[1], expected.sum(axis=1))
    np.testing.assert_array_equal(moved.received[1], expected.sum(axis=0))
    random = np.random.default_rng(images)
    per_pair, of_sender = random.uniform(1, 2, (2, RANKS, RANKS)), random.uniform(1, 2, RANKS)
    each = expected * per_pair * of_sender[:, None]
    np.testing.assert_allclose(moved.over(per_pair, of_sender), (each.sum(axis=2), each.sum(axis=1)), atol=1e-12)
    np.testing.assert_array_equal(moved.sent[0] > 0, count.sum(axis=1) > 0)
    np.testing.assert_array_equal(moved.received[0] > 0, count.sum(axis=0) > 0)
    np.testing.assert_array_equal(moved.transposed.matrix, expected.T)
    ranks = sorted({rank for one in listed for rank in (one.source, one.target)})
    assert taking_part(source, target, images, channels) == tuple(ranks)


def test_a_thousand_ranks_need_no_list_of_a_million_messages() -> None:
    everyone, split = replicated((1,) * 1024), Layout("K", (4,) * 1024)
    moved = traffic(split, everyone, 32, 4096)
    assert moved.sent[0].tolist() == [1023] * 1024
    assert moved.received[1].tolist() == [32 * 4 * 1023] * 1024
