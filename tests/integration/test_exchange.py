"""Real exchanges between every pair of layouts, through both ways: the adjoint test <E x, y> = <x, E* y>."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from distributed import Client

from pipeline.cluster.devices import discover
from pipeline.cluster.gang import RankContext, run_gang
from pipeline.plan.instructions import Exchange, Placed, TensorSpec
from pipeline.plan.layouts import Layout, images, kernels, master
from pipeline.run.transport import Transport

RANKS = 3
LAYOUTS = [
    master(RANKS),
    Layout("R", (1, 1, 1)),
    Layout("R", (0, 1, 1)),
    Layout("P", (1, 1, 1)),
    Layout("P", (1, 0, 1)),
    kernels((4, 2, 1)),
    kernels((0, 7, 0)),
    kernels((1, 0, 6)),
    images((2, 1, 2)),
    images((0, 0, 5)),
]
SPECS = {
    "activation": TensorSpec(shape=(5, 7, 3, 2), channel_axis=1, images_axis=0),
    "kernels of a convolution": TensorSpec(shape=(7, 4, 3, 3), channel_axis=0, images_axis=None),
    "input channels of a convolution": TensorSpec(shape=(5, 7, 2, 2), channel_axis=1, images_axis=None),
}


def _part(spec: TensorSpec, layout: Layout, rank: int, seed: int) -> torch.Tensor | None:
    """A random local part; equal on all ranks that hold a copy is not needed: an exchange is linear in all of them."""
    box = spec.boxes(layout)[rank]
    generator = torch.Generator().manual_seed(seed * 10 + rank)
    return torch.randn(spec.local_shape(box), generator=generator, dtype=torch.float64) if box else None


def _dot(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
    return 0.0 if one is None or other is None else float((one * other).sum())


def _adjoint_tests(context: RankContext, exchanges: list[Exchange], shared_memory: bool) -> list[tuple[float, float]]:
    """This rank's part of both inner products of every exchange."""
    transport, products = Transport(context, shared_memory=shared_memory), []
    for seed, forward in enumerate(exchanges):
        x = _part(forward.spec, forward.source.layout, context.rank, 2 * seed)
        y = _part(forward.spec, forward.target.layout, context.rank, 2 * seed + 1)
        moved = None if y is None else torch.full_like(y, torch.nan)
        back = None if x is None else torch.full_like(x, torch.nan)
        transport.exchange(forward, x, moved)
        transport.exchange(replace(forward, direction="backward"), y, back)
        products.append((_dot(moved, y), _dot(x, back)))
    return products


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared memory", "gloo"])
@pytest.mark.parametrize("name", SPECS)
def test_every_exchange_passes_the_adjoint_test(client: Client, name: str, shared_memory: bool) -> None:
    spec = SPECS[name]
    layouts = [layout for layout in LAYOUTS if layout.kind != "B" or spec.images_axis is not None]
    exchanges = [
        Exchange(
            name=f"{source} {target}", direction="forward", source=Placed("x", source), target=Placed("x", target),
            spec=spec,
        )
        for source in layouts
        for target in layouts
    ]  # fmt: skip
    products = run_gang(
        client, discover(client)[:RANKS], _adjoint_tests, [(exchanges, shared_memory)] * RANKS, label="adjoint"
    )
    for exchange, *parts in zip(exchanges, *products, strict=True):
        one, other = (sum(part[side] for part in parts) for side in (0, 1))
        assert one == pytest.approx(other, rel=1e-10, abs=1e-10), exchange.name
        assert one == one, exchange.name  # not NaN: every element of the target was written
