"""A GPU and CPUs in one gang: exact, calibrated and timed. Skipped, visibly, where there is no GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from distributed import Client

import pipeline
from pipeline.cluster.devices import discover
from pipeline.networks import network
from pipeline.results.contracts import validate_cell
from pipeline.run.benchmark import Bench
from tests.engine import BATCH, images, largest_difference, plain_loop

pytestmark = pytest.mark.gpu

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    devices = [pipeline.Device("gpu"), pipeline.Device("cpu"), pipeline.Device("cpu")]
    with pipeline.local_cluster(devices, dashboard=False) as connected:
        yield connected


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0)], ids=["the GPU is the master", "a CPU is the master"])
@pytest.mark.parametrize("strategy", ["paper", "kernel", "equal"])
def test_a_gang_of_gpu_and_cpus_is_exact(client: Client, strategy: str, order: tuple[int, ...]) -> None:
    members = {member.name: member for member in discover(client)}
    chosen = [members[("gpu:0", "cpu:0", "cpu:1")[position]] for position in order]
    shares = None if strategy == "equal" else (0.5, 0.3, 0.2)[: len(order)] if len(order) == 3 else (0.4, 0.6)
    model, dataset = network("6:10").double(), images()
    losses, weights = plain_loop(model, dataset, SGD)
    result = pipeline.fit(
        model,
        dataset,
        client,
        members=chosen,
        batch_size=BATCH,
        epochs=2,
        strategy=strategy,
        shares=shares,
        optimizer=SGD,
    )
    np.testing.assert_allclose(result.history.loss.values, losses, rtol=1e-9)
    assert largest_difference(result.model.state_dict(), weights) < 1e-9


@pytest.mark.parametrize("strategy", ["single", "ddp", "paper", "kernel", "auto"])
def test_a_gpu_is_calibrated_and_timed(client: Client, strategy: str) -> None:
    members = [member for member in discover(client) if member.name in ("gpu:0", "cpu:0")]
    dataset, model = images(dtype=torch.float32), network("20:50")
    calibration = pipeline.calibrate(model, dataset.tensors[0][:BATCH], client, members=members, network="20:50")
    bench = Bench(
        model=model, dataset=dataset, client=client, members=members, network="20:50", batch_size=BATCH,
        device_set="cpu + gpu", calibration=calibration,
    )  # fmt: skip
    cell = bench.time(strategy, repetitions=3)
    validate_cell(cell)
    assert cell.status.item() == "ok"
    assert (cell.step_time > 0).all()
