"""What does not fit the memory of its devices is refused before it trains, whatever plans it; what fits trains."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

import pipeline
from pipeline.calibration.measure import calibrate
from pipeline.cluster.devices import Member, discover
from pipeline.errors import TooLittleMemoryError
from pipeline.graph.trace import trace
from pipeline.networks import network
from pipeline.plan.fitting import needed_memory
from pipeline.plan.memory import predict_memory
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.planner import plan_graph
from pipeline.plan.strategies import plan_network
from pipeline.results.contracts import validate_cell
from pipeline.run.benchmark import Bench, measure_cells
from pipeline.run.launch import held_memory
from tests import synthetic
from tests.engine import images

BATCH = 22
REFUSED_WITHIN_S = 20.0
MIB = 2**20


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with pipeline.local_cluster([pipeline.Device("cpu"), pipeline.Device("cpu")], dashboard=False) as one:
        yield one


def _limited(members: Sequence[Member], limits: NDArray[np.float64]) -> list[Member]:
    return [replace(one, memory=int(limit)) for one, limit in zip(members, limits, strict=True)]


def _planned(strategy: Strategy, ranks: int, shares: Sequence[float] | None) -> Plan:
    graph = trace(network("80:400"), torch.zeros(2, 3, 32, 32))
    return plan_network(graph, strategy, batch_size=BATCH, labels=["cpu"] * ranks, shares=shares)


@pytest.mark.parametrize(
    ("strategy", "ranks", "shares", "as_plan"),
    [
        ("single", 1, None, False),
        ("ddp", 2, None, False),
        ("equal", 2, None, False),
        ("kernel", 2, (0.5, 0.5), False),
        ("kernel", 2, (0.5, 0.5), True),
    ],
    ids=["a single device", "ddp", "equal", "shares", "a whole plan"],
)
def test_what_does_not_fit_is_refused_before_it_trains_and_what_fits_trains(
    client: Client, strategy: Strategy, ranks: int, shares: Sequence[float] | None, as_plan: bool
) -> None:
    dataset, plan, members = images(dtype=torch.float32), _planned(strategy, ranks, shares), discover(client)[:ranks]
    graph = trace(network("80:400"), torch.zeros(2, 3, 32, 32))
    need, held = predict_memory(graph, plan), held_memory(client, members)
    how: dict[str, Any] = {"plan": plan} if as_plan else {"strategy": strategy, "shares": shares}
    fit = functools.partial(pipeline.fit, network("80:400"), dataset, client, batch_size=BATCH, max_steps=1, **how)
    begin = time.monotonic()
    last = ranks - 1
    tight = held + 1.5 * need + 64 * MIB
    tight[last] = held[last] + 0.5 * need[last]
    with pytest.raises(TooLittleMemoryError, match=rf"device {last} \(cpu\) needs about \d+ MiB .* but has \d+ MiB"):
        fit(members=_limited(members, tight))
    assert time.monotonic() - begin < REFUSED_WITHIN_S
    result = fit(members=_limited(members, held + 1.5 * need + 64 * MIB))
    assert np.isfinite(result.history.loss.values).all()
    assert result.plan.strategy == strategy


def test_a_device_with_too_little_memory_gets_a_tenth_of_its_share_and_keeps_to_it(client: Client) -> None:
    model, batch_size = network("150:800"), 32
    dataset = TensorDataset(torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,)))
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    members = discover(client)
    measured = calibrate(
        model, torch.zeros(2, 3, 32, 32), client, batch_size=batch_size, fractions=(0.125, 1.0), repetitions=1
    )
    labels = [member.device.label for member in members]
    fair = plan_graph(graph, measured, batch_size=batch_size, strategy="kernel", labels=labels)
    part = fair.convolution_shares(graph)[1] / 10
    tenth = plan_network(graph, "kernel", batch_size=batch_size, labels=labels, shares=(1 - part, part))
    limit = measured.process_memory.values[1] + needed_memory(graph, tenth)[1]
    device = replace(members[1].device, memory=int(limit) // 2**20 * 2**20)
    limited = (members[0], replace(members[1], device=device, memory=device.memory))
    told = measured.copy(deep=True)
    told.memory_limit[1], told.device_label[1] = device.memory, device.label
    result = pipeline.fit(
        model, dataset, client, members=limited, batch_size=batch_size, strategy="kernel", max_steps=3, calibration=told
    )
    assert result.plan.labels[1].endswith("MiB]")
    assert 0 < result.plan.convolution_shares(graph)[1] < 1.3 * part
    assert result.timing.peak_memory.values[1] <= device.memory


def test_a_plan_asks_only_the_devices_that_it_uses_and_none_beside_a_calibration(client: Client) -> None:
    model, dataset, members = network("20:50"), images(dtype=torch.float32), discover(client)
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    plan = plan_network(graph, "single", batch_size=BATCH, labels=["cpu", "cpu"])
    assert plan.devices == (0,)
    left = held_memory(client, members[:1])[0] + 2 * predict_memory(graph, plan)[0] + 64 * MIB
    gone = replace(members[1], name="gone", address="tcp://127.0.0.1:1", memory=1)
    fit = functools.partial(pipeline.fit, model, dataset, client, batch_size=BATCH, max_steps=1, plan=plan)
    assert np.isfinite(fit(members=[replace(members[0], memory=int(left)), gone]).history.loss.values).all()
    calibration = synthetic.calibration_of(graph, ["cpu", "cpu"])
    calibration["process_memory"] = ("device", [1e15, 1e15])
    with pytest.raises(TooLittleMemoryError):
        fit(members=[members[0], gone], calibration=calibration)


def test_a_device_set_that_is_too_small_is_refused() -> None:
    with (
        pipeline.local_cluster([pipeline.Device("cpu", memory=300 * MIB)], dashboard=False) as client,
        pytest.raises(TooLittleMemoryError, match=r"device 0 \(cpu\[300MiB\]\) needs about \d+ MiB"),
    ):
        pipeline.fit(network("500:1500"), images(dtype=torch.float32), client, batch_size=BATCH)


def test_the_optimiser_and_the_images_count(client: Client) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 32 * 32, 4096))  # 64 MiB
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    members = discover(client)[:1]
    plan = plan_network(graph, "single", batch_size=8, labels=["cpu"])
    limits = held_memory(client, members) + predict_memory(graph, plan) + 32 * MIB
    fit = functools.partial(
        pipeline.fit, model, client=client, members=_limited(members, limits), batch_size=8, max_steps=1
    )
    few = images(dtype=torch.float32)
    assert np.isfinite(fit(few).history.loss.values).all()
    with pytest.raises(TooLittleMemoryError):
        fit(few, optimizer=functools.partial(torch.optim.Adam, lr=1e-3))
    many = TensorDataset(torch.zeros(6000, 3, 32, 32), torch.zeros(6000, dtype=torch.int64))
    for how in ({"dataset": many}, {"dataset": few, "validation": many}):
        with pytest.raises(TooLittleMemoryError, match=r"beside its process and 7\d MiB of images"):
            fit(**how)  # type: ignore[arg-type]


def test_a_strategy_that_does_not_fit_is_a_cell_without_times_among_the_others(client: Client) -> None:
    model, dataset = network("20:50"), images(dtype=torch.float32)
    graph, members = trace(model, torch.zeros(2, 3, 32, 32)), discover(client)
    calibration = calibrate(
        model, torch.zeros(2, 3, 32, 32), client, members=members, batch_size=BATCH, fractions=(0.5, 1.0), repetitions=1
    )
    alone = predict_memory(graph, plan_network(graph, "single", batch_size=BATCH, labels=["cpu"])).max()
    halves = plan_network(graph, "kernel", batch_size=BATCH, labels=["cpu"] * 2, shares=(0.5, 0.5))
    split = needed_memory(graph, halves).max()
    size = sum(one.nbytes for one in dataset.tensors)
    bench = Bench(
        model=model, dataset=dataset, client=client, network="20:50", batch_size=BATCH, device_set="2 x cpu",
        members=_limited(members, calibration.process_memory.values + (alone + split) / 2 + size),
        calibration=calibration,
    )  # fmt: skip
    strategies: tuple[Strategy, ...] = ("single", "kernel", "auto")
    cells = measure_cells({name: (bench, name) for name in strategies}, rounds=2, repetitions=2, warmup=1)
    for cell in cells.values():
        validate_cell(cell)
    # Which of the two equal devices was measured as the faster one is chance.
    assert re.match(r"out of memory: device \d \(cpu\) needs about ", cells["single"].status.item())
    assert cells["single"].sizes["repetition"] == 0
    assert cells["kernel"].status.item() == cells["auto"].status.item() == "ok"
    assert np.isfinite(cells["kernel"].step_time).all()
