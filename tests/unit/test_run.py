"""The run's own arithmetic: batches, the emulation of slow devices, the account of a step."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.calibration.links import link_of
from pipeline.cluster.devices import Device
from pipeline.plan.labels import InstructionLabel
from pipeline.results.timeline import busy_times
from pipeline.run.batches import batch_indices, part_of
from pipeline.run.convolution_timer import ConvolutionTimer
from pipeline.run.emulation import Throttle


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 3), st.booleans())
def test_every_epoch_sees_every_image_once(images: int, batch_size: int, epochs: int, shuffle: bool) -> None:
    found = batch_indices(images, batch_size, epochs=epochs, max_steps=None, shuffle=shuffle, seed=0)
    assert len(found) == epochs
    for epoch in found:
        assert sorted(index for batch in epoch for index in batch) == list(range(images))
        assert all(len(batch) == batch_size for batch in epoch[:-1])


def test_the_seed_alone_decides_the_order() -> None:
    one, same, other = (batch_indices(20, 6, epochs=2, max_steps=None, shuffle=True, seed=seed) for seed in (3, 3, 4))
    assert one == same
    assert one != other
    assert one[0] != one[1]


@given(st.integers(0, 40), st.integers(1, 6))
def test_equal_parts_make_up_the_batch(images: int, ranks: int) -> None:
    parts = [part_of(rank, ranks, range(images)) for rank in range(ranks)]
    assert [index for part in parts for index in part] == list(range(images))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("speed", [0.5, 0.25])
def test_an_emulated_device_stretches_its_processor_time(speed: float) -> None:
    throttle = Throttle(Device("cpu", speed=speed))
    wall, busy = time.perf_counter(), time.thread_time()
    for _ in range(5):
        with throttle.work():
            end = time.thread_time() + 0.02
            while time.thread_time() < end:
                pass
    stretched, used = time.perf_counter() - wall, time.thread_time() - busy
    assert stretched >= 0.95 * used / speed
    assert throttle.charged == pytest.approx(used / speed, rel=0.05)


def test_a_device_of_full_speed_does_not_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("slept"))
    with Throttle(Device("cpu")).work():
        sum(range(10_000))


def test_waiting_for_the_last_rank_is_idle_and_the_rest_is_exchange() -> None:
    labels = [
        InstructionLabel("work", "compute", "forward", 0),
        InstructionLabel("move", "exchange", "forward", 10),
        InstructionLabel("update", "update", "update", 0),
    ]
    # One step, three instructions, two ranks: rank 0 computes 1 s and waits 2 s for rank 1; moving takes 0.5 s.
    times = np.array([[[[0, 1], [0, 3]], [[1, 3.5], [3, 3.5]], [[3.5, 4], [np.nan, np.nan]]]], dtype=float)
    found = busy_times(labels, times, np.array([[0.0, 4.0]]))
    np.testing.assert_allclose(found["compute_time"], [[1.5], [3.0]])
    np.testing.assert_allclose(found["exchange_time"], [[0.5], [0.5]])
    np.testing.assert_allclose(found["idle_time"], [[2.0], [0.5]])


def test_latency_and_bandwidth_follow_from_the_times_of_messages() -> None:
    sizes = (1_000, 1_001_000)
    link = link_of(np.array([[0.001, 0.001, 0.005], [0.011, 0.011, 0.2]]), sizes)
    assert link.latency == pytest.approx(0.001)
    assert link.bandwidth == pytest.approx(1e8)


def test_the_convolution_timer_sees_forward_and_backward_and_nothing_else() -> None:
    timer = ConvolutionTimer(torch.device("cpu"))
    x = torch.randn(8, 16, 32, 32)
    with timer:
        torch.nn.Linear(32, 32)(x).sum().backward()
    assert timer.seconds == 0
    convolution = torch.nn.Conv2d(16, 32, 5)
    with timer:
        loss = convolution(x).sum()
    forward = timer.seconds
    assert forward > 0
    with timer:
        loss.backward()
    assert timer.seconds > forward
