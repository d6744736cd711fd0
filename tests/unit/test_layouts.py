"""Boxes and messages are arithmetic, and hold for every pair of layouts."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.plan.layouts import (
    Box,
    Layout,
    Message,
    Range,
    kernels,
    master,
    messages,
    partial,
    replicated,
    transposed,
)


@st.composite
def tensors_and_layouts(draw: st.DrawFn) -> tuple[int, int, Layout, Layout]:
    """Images, channels, and two layouts over the same 1 to 4 ranks, shares of zero included."""
    ranks = draw(st.integers(1, 4))
    shares = st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks).filter(any).map(tuple)
    images_of, channels_of = draw(shares), draw(shares)
    flags = st.lists(st.integers(0, 1), min_size=ranks, max_size=ranks).filter(any).map(tuple)

    def layout() -> Layout:
        kind = draw(st.sampled_from("MRPKB"))
        if kind == "M":
            return master(ranks)
        if kind in "RP":
            return Layout(kind, draw(flags))  # type: ignore[arg-type]
        if kind == "K":
            order = draw(st.permutations(channels_of))
            return Layout("K", tuple(order))
        return Layout("B", tuple(draw(st.permutations(images_of))))

    return sum(images_of), sum(channels_of), layout(), layout()


@given(tensors_and_layouts())
def test_boxes_of_a_split_tile_the_tensor(case: tuple[int, int, Layout, Layout]) -> None:
    images, channels, layout, _ = case
    held = np.zeros((images, channels), dtype=int)
    for box in layout.boxes(images, channels):
        held[box.images.start : box.images.stop, box.channels.start : box.channels.stop] += 1
    copies = sum(map(bool, layout.shares)) if layout.kind in "RP" else 1
    assert (held == copies).all()


def _apply(sent: tuple[Message, ...], parts: list[np.ndarray], ranks: int, shape: tuple[int, int]) -> list[np.ndarray]:
    """Carry out messages on whole-sized arrays, one per rank."""
    received = [np.zeros(shape) for _ in range(ranks)]
    for message in sent:
        where = np.s_[
            message.box.images.start : message.box.images.stop, message.box.channels.start : message.box.channels.stop
        ]
        received[message.target][where] += parts[message.source][where]
    return received


def _local(layout: Layout, shape: tuple[int, int], generator: np.random.Generator) -> list[np.ndarray]:
    """Random values where each rank holds something, zero elsewhere."""
    parts = []
    for box in layout.boxes(*shape):
        part = np.zeros(shape)
        where = np.s_[box.images.start : box.images.stop, box.channels.start : box.channels.stop]
        part[where] = generator.standard_normal(part[where].shape)
        parts.append(part)
    return parts


@given(tensors_and_layouts())
def test_exchange_preserves_the_tensor(case: tuple[int, int, Layout, Layout]) -> None:
    """What the target layout means as a whole tensor is what the source layout meant."""
    images, channels, source, target = case
    whole = np.random.default_rng(0).standard_normal((images, channels))
    holders = source.holders
    parts = []
    for rank, box in enumerate(source.boxes(images, channels)):
        part = np.zeros_like(whole)
        where = np.s_[box.images.start : box.images.stop, box.channels.start : box.channels.stop]
        part[where] = whole[where]
        if source.kind == "P":  # summands: unequal parts that add up
            part *= (holders.index(rank) + 1) / sum(range(1, len(holders) + 1)) if rank in holders else 0
        parts.append(part)
    received = _apply(messages(source, target, images, channels), parts, len(parts), (images, channels))
    if target.kind == "P":
        np.testing.assert_allclose(sum(received), whole)
        return
    for got, box in zip(received, target.boxes(images, channels), strict=True):
        where = np.s_[box.images.start : box.images.stop, box.channels.start : box.channels.stop]
        np.testing.assert_allclose(got[where], whole[where])


@given(tensors_and_layouts())
def test_adjoint_is_the_transpose_for_every_pair(case: tuple[int, int, Layout, Layout]) -> None:
    images, channels, source, target = case
    forward = messages(source, target, images, channels)
    backward = messages(target.adjoint, source.adjoint, images, channels)
    assert Counter(backward) == Counter(transposed(forward))
    generator = np.random.default_rng(1)
    x, y = (_local(layout, (images, channels), generator) for layout in (source, target))
    shape, ranks = (images, channels), len(x)
    one = sum(float((a * b).sum()) for a, b in zip(_apply(forward, x, ranks, shape), y, strict=True))
    other = sum(float((a * b).sum()) for a, b in zip(x, _apply(backward, y, ranks, shape), strict=True))
    assert one == pytest.approx(other, rel=1e-12, abs=1e-12)


def test_scatter_and_gather_send_only_what_the_other_lacks() -> None:
    split = kernels((2, 3))
    assert messages(master(2), split, 4, 5) == (
        Message(0, 0, Box(Range(0, 4), Range(0, 2))),
        Message(0, 1, Box(Range(0, 4), Range(2, 5))),
    )
    assert messages(split, master(2), 4, 5) == (
        Message(0, 0, Box(Range(0, 4), Range(0, 2))),
        Message(1, 0, Box(Range(0, 4), Range(2, 5))),
    )


def test_all_gather_sends_each_shard_to_each_holder() -> None:
    sent = messages(kernels((1, 0, 4)), replicated((1, 0, 1)), 2, 5)
    assert {(message.source, message.target) for message in sent} == {(0, 0), (2, 0), (0, 2), (2, 2)}


def test_a_single_holder_needs_no_copy_and_no_sum() -> None:
    assert replicated((5, 0, 0)).kind == partial((5, 0, 0)).kind == "M"
    assert replicated((0, 5)).kind == "R"


@pytest.mark.parametrize("extent", [6, 8], ids=["too many shares", "too few shares"])
def test_shares_that_do_not_add_up_print_the_equation(extent: int) -> None:
    with pytest.raises(InputError, match=rf"3 \+ 4 = 7 do not add up to the {extent} channels"):
        kernels((3, 4)).boxes(1, extent)


@pytest.mark.parametrize(("kind", "shares"), list(product("KB", [(-1, 2), (0, 0)])))
def test_impossible_shares_are_refused(kind: str, shares: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="layout"):
        Layout(kind, shares)  # type: ignore[arg-type]


def test_a_layout_that_travels_has_no_hash_of_another_process() -> None:
    layout = Layout("K", (3, 0, 5))
    assert {layout: "known"}[pickle.loads(pickle.dumps(layout))] == "known"
    assert hash(layout) not in vars(pickle.loads(pickle.dumps(layout))).values()
