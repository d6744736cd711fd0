"""The public way to train: what `fit` gives back, what it refuses, and how it ends when something breaks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from distributed import Client
from torch.utils.data import TensorDataset

import pipeline
from pipeline import training
from pipeline.cluster.devices import discover, real_devices, wait_for_members
from pipeline.graph.trace import trace
from pipeline.networks import network
from tests.engine import BATCH, IMAGES, images

BOUND_S = 15.0
"""By when a lost worker or a failed rank must have ended in an error."""


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two devices, one of them emulated at half speed."""
    with pipeline.local_cluster([pipeline.Device("cpu"), pipeline.Device("cpu", speed=0.5)], dashboard=False) as one:
        yield one


def test_fit_gives_model_history_timing_and_plan(client: Client, tmp_path: Path) -> None:
    model, dataset = network("6:10"), images(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = pipeline.fit(
        model, dataset, client, batch_size=BATCH, epochs=2, strategy="kernel", validation=dataset,
        checkpoint=tmp_path / "weights.pt",
    )  # fmt: skip
    steps = 2 * -(-IMAGES // BATCH)
    assert result.history.loss.sizes == {"step": steps}
    assert result.timing.step_time.sizes == {"step": steps}
    assert (result.timing.step_time > 0).all()
    assert result.timing.step_time.attrs["units"] == "s"
    assert list(result.timing.device_label.values) == ["cpu", "cpu@0.5"]
    assert result.plan.strategy == "kernel"
    assert sum(result.plan["conv2"].output.shares) == 10
    output = result.model(dataset.tensors[0]).argmax(1)
    accuracy = (output == dataset.tensors[1]).float().mean().item()
    assert result.history.accuracy.values[-1] == pytest.approx(accuracy)
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(saved[name], tensor) for name, tensor in result.model.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not all(torch.equal(before[name], tensor) for name, tensor in saved.items())


def test_the_timeline_lies_within_its_step(client: Client) -> None:
    result = pipeline.fit(
        network("6:10"), images(), client, batch_size=BATCH, strategy="paper", shares=(0.5, 0.5), max_steps=2
    )
    timing = result.timing
    assert (timing.instruction_end >= timing.instruction_start).where(timing.instruction_start.notnull(), True).all()
    # A step begins on the master, so an early rank may already wait for it.
    last = timing.instruction_end.max(("instruction", "device")).values
    assert (last <= timing.step_time.values[timing.kept_step.values] + 1e-3).all()
    assert {"compute", "exchange", "update"} == set(timing.instruction_kind.values)


def test_a_graph_that_is_known_is_not_captured_again(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("6:10")
    graph = trace(model, images()[0][0][None])
    monkeypatch.setattr(training, "trace", lambda *_: pytest.fail("captured again"))
    result = pipeline.fit(model, images(), client, batch_size=BATCH, max_steps=1, strategy="equal", graph=graph)
    assert result.plan.graph is graph


def test_max_steps_ends_a_training_early(client: Client) -> None:
    result = pipeline.fit(network("6:10"), images(), client, batch_size=BATCH, epochs=9, max_steps=4, strategy="equal")
    assert result.history.loss.sizes == {"step": 4}


def test_progress_reaches_the_caller(client: Client) -> None:
    seen: list[int] = []
    pipeline.fit(
        network("6:10"),
        images(),
        client,
        batch_size=BATCH,
        strategy="equal",
        on_progress=lambda step, _: seen.append(step),
    )
    assert seen[-1] == -(-IMAGES // BATCH)


def test_without_a_client_the_devices_of_this_machine_train() -> None:
    result = pipeline.fit(network("6:10"), images(), batch_size=BATCH, max_steps=1, strategy="equal")
    assert np.isfinite(result.history.loss.values).all()
    assert result.plan.labels == tuple(one.label for one in real_devices())


class _Unpaired(TensorDataset):
    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        return self.tensors[0][index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": IMAGES + 1}, f"batch size {IMAGES + 1} is larger than the data set, which has {IMAGES} images"),
        ({"batch_size": 0}, "batch size 0 must be at least 1"),
        ({"epochs": 0}, "epochs 0 must be at least 1"),
        ({"strategy": "magic"}, "strategy 'magic' is unknown"),
        ({"strategy": "kernel", "shares": (0.5, 0.2)}, r"0.5 \+ 0.2 = 0.7 must add up to 1"),
        ({"checkpoint": "/nowhere/at/all.pt"}, "its folder does not exist"),
    ],
    ids=["batch too large", "no batch", "no epoch", "unknown strategy", "bad shares", "no folder"],
)
def test_bad_input_is_named(client: Client, changes: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"batch_size": BATCH, "strategy": "equal", **changes}
    with pytest.raises(pipeline.InputError, match=message):
        pipeline.fit(network("6:10"), images(), client, **given)  # type: ignore[arg-type]


def test_a_data_set_without_labels_is_named(client: Client) -> None:
    with pytest.raises(pipeline.InputError, match="pairs of an image tensor"):
        pipeline.fit(network("6:10"), _Unpaired(torch.rand(9, 3, 32, 32)), client, batch_size=2, strategy="equal")


def test_a_loss_that_is_no_number_stops_with_the_step(client: Client) -> None:
    broken = TensorDataset(torch.full((8, 3, 32, 32), torch.inf), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(pipeline.RunError, match="the loss is nan at step 1"):
        pipeline.fit(network("6:10"), broken, client, batch_size=4, strategy="equal")


def _fails_at_work(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """A loss that no check before a run comes across."""
    return torch.linalg.solve(torch.zeros(10, 10, dtype=output.dtype), output.T).sum()


def test_a_rank_that_raises_ends_in_its_own_error_and_the_next_run_works(client: Client) -> None:
    begin = time.monotonic()
    with pytest.raises(pipeline.RunError, match=r"rank 0 .* singular"):
        pipeline.fit(network("6:10"), images(), client, batch_size=BATCH, strategy="equal", loss=_fails_at_work)
    assert time.monotonic() - begin < BOUND_S
    assert (
        pipeline.fit(network("6:10"), images(), client, batch_size=BATCH, strategy="equal", max_steps=1).plan.ranks == 2
    )


@pytest.mark.parametrize("victim", [0, 1], ids=["the master", "another rank"])
def test_a_killed_worker_ends_in_one_clear_error_and_the_next_run_works(client: Client, victim: int) -> None:
    members = wait_for_members(client, 2)
    process = client.run(os.getpid, workers=[members[victim].address])[members[victim].address]
    killed_at: list[float] = []

    def kill(step: int, _: dict[str, float]) -> None:
        if step >= 2 and not killed_at:
            os.kill(process, signal.SIGKILL)
            killed_at.append(time.monotonic())

    with pytest.raises(pipeline.RunError, match=f"cpu:{victim}.* was lost"):
        pipeline.fit(
            network("50:100"), images(), client, batch_size=BATCH, epochs=10_000, strategy="kernel", shares=(0.5, 0.5),
            on_progress=kill,
        )  # fmt: skip
    assert time.monotonic() - killed_at[0] < BOUND_S
    assert not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    wait_for_members(client, 2)
    again = pipeline.fit(network("6:10"), images(), client, batch_size=BATCH, strategy="equal", max_steps=2)
    assert np.isfinite(again.history.loss.values).all()
    assert len(discover(client)) == 2
