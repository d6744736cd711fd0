"""Emulated links: training stays exact, and a step takes as long as the link makes it."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from distributed import Client

import pipeline
from pipeline.calibration.links import LINK_BYTES, link_of, measure_links
from pipeline.cluster.devices import discover
from pipeline.cluster.gang import RankContext, run_gang
from pipeline.errors import InputError
from pipeline.graph.trace import trace
from pipeline.links import Link
from pipeline.networks import network
from pipeline.plan.instructions import Exchange, Placed, TensorSpec
from pipeline.plan.layouts import kernels, master
from pipeline.run.benchmark import Bench
from pipeline.run.link_emulation import Ports, sleep_until
from pipeline.run.transport import Transport
from tests.engine import images
from tests.synthetic import calibration_of

RANKS, ELEMENTS = 3, 250_000
LINK = Link(latency=0.02, bandwidth=1e7)


def _scatter_and_gather(context: RankContext, link: Link | None) -> list[float]:
    """How long each rank takes to scatter a tensor from the master and to gather it again."""
    shares = (0, ELEMENTS, ELEMENTS)
    transport = Transport(context, link=link)
    out = Exchange(
        name="x", direction="forward", source=Placed("x", master(RANKS)), target=Placed("x", kernels(shares)),
        spec=TensorSpec(shape=(1, 2 * ELEMENTS), channel_axis=1, images_axis=0),
    )  # fmt: skip
    back = Exchange(name="y", direction="forward", source=out.target, target=out.source, spec=out.spec)
    whole = torch.arange(2.0 * ELEMENTS)[None] if context.rank == 0 else None
    part = torch.zeros(1, shares[context.rank]) if shares[context.rank] else None
    again = torch.zeros(1, 2 * ELEMENTS) if context.rank == 0 else None
    took = []
    for exchange, source, target in ((out, whole, part), (back, part, again)):
        context.barrier()
        start = time.perf_counter()
        transport.exchange(exchange, source, target)
        took.append(time.perf_counter() - start)
    if again is not None and whole is not None:
        assert torch.equal(again, whole)
    return took


def test_the_masters_port_is_shared_in_both_directions(client: Client) -> None:
    """Each message is 0.1 s of the link: the master's two leave, and arrive, one after the other."""
    members = discover(client)[:RANKS]
    took = run_gang(client, members, _scatter_and_gather, [(LINK,)] * RANKS, label="emulated link")
    each = 4 * ELEMENTS / LINK.bandwidth
    scatter, gather = np.array(took).T
    assert scatter[0] >= 2 * each * 0.95  # the master is done when both have left
    assert scatter[1] >= (each + LINK.latency) * 0.95
    assert scatter[2] >= (2 * each + LINK.latency) * 0.95
    assert gather[0] >= (2 * each + LINK.latency) * 0.95  # both arrive at once, and share the port
    assert (gather[1:] >= each * 0.95).all()
    without = run_gang(client, members, _scatter_and_gather, [(None,)] * RANKS, label="no link")
    assert np.array(without).max() < np.array(took).max()


class _SlowToSend(Ports):
    """Receives at once."""

    def arrive(self, left: float, size: int) -> None:  # noqa: ARG002
        sleep_until(left)


def _measured_links(context: RankContext) -> dict[int, np.ndarray]:
    """The links as a calibration measures them, where the last rank is slow to send."""
    transport = Transport(context, link=Link(latency=0.0, bandwidth=1e12))
    if context.rank == RANKS - 1:
        transport._ports = _SlowToSend(LINK)
    return measure_links(context, transport, repetitions=2)


def test_each_direction_of_a_link_is_measured(client: Client) -> None:
    found = run_gang(client, discover(client)[:RANKS], _measured_links, [()] * RANKS, label="links")
    took = LINK_BYTES[-1] / LINK.bandwidth
    assert sorted(found[0]) == [1, 2]
    for other, slow in ((1, False), (2, True)):
        there, back = np.nanmedian(found[0][other], axis=-1)
        assert there[-1] < 0.5 * took
        assert (back[-1] > 0.9 * took) is np.bool_(slow)
        assert there[0] == back[0], "one clock cannot tell latencies apart"
    link = link_of(found[0][2][1], LINK_BYTES)
    assert link.bandwidth == pytest.approx(LINK.bandwidth, rel=0.1)


@pytest.mark.parametrize("strategy", ["ddp", "paper", "kernel", "batch", "auto"])
def test_training_over_a_slow_link_is_the_same_and_takes_the_time_of_its_bytes(client: Client, strategy: str) -> None:
    model, link = network("6:10"), "2Mbit/s+1ms"
    members = discover(client)[:RANKS]
    calibration = calibration_of(trace(model, torch.zeros(2, 3, 32, 32)), ["cpu"] * RANKS)
    cells = [
        Bench(
            model=model, dataset=images(dtype=torch.float32), client=client, members=members, network="6:10",
            batch_size=8, device_set="3 x cpu", calibration=calibration, link=one,
        ).time(strategy, repetitions=2, warmup=1)  # type: ignore[arg-type]
        for one in ("loopback", link)
    ]  # fmt: skip
    for cell in cells:
        assert cell.status.item() == "ok", cell.status.item()
    np.testing.assert_allclose(cells[1].loss, cells[0].loss, rtol=1e-5)
    assert cells[1].link.item() == link
    if strategy in ("paper", "kernel", "batch"):
        # What the busiest instruction moves bounds the step from below, however the rest overlaps.
        largest = float(cells[1].instruction_bytes.max()) / RANKS
        assert cells[1].step_time.min() >= largest / 2.5e5
        assert cells[1].predicted_step_time.item() > cells[0].predicted_step_time.item()
    if strategy == "auto":
        assert cells[1].sizes["device"] == 1  # no exchange is worth it


def test_a_link_to_a_device_elsewhere_cannot_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    context = RankContext(
        rank=0, size=2, device=pipeline.Device("cpu"), torch_device=torch.device("cpu"), group=None, generation="x"
    )
    monkeypatch.setattr("pipeline.run.transport.neighbours", lambda _: {})
    with pytest.raises(InputError, match="only be emulated between CPU devices of one host"):
        Transport(context, link=LINK)
