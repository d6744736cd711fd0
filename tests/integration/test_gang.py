"""Gangs on real worker processes: what they return, and how they end when ranks, workers or drivers die."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
import torch
import torch.distributed as dist
from distributed import Client, Lock

from pipeline.cluster.deployment import connect, local_cluster
from pipeline.cluster.devices import Device, Member, discover, select, wait_for_members
from pipeline.cluster.gang import RankContext, run_gang
from pipeline.errors import InputError, RunError

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).resolve().parents[2]
# Workers cannot import the tests, so the rank functions below travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def sum_over_ranks(context: RankContext, value: float) -> dict[str, Any]:
    total = torch.tensor([value])
    if context.size > 1:
        assert context.group is dist.group.WORLD
        dist.all_reduce(total)
    for step in range(3):
        context.report(step, loss=1 / (step + 1))
        context.barrier()
    # Zero where denormals are flushed.
    tiny = (torch.tensor([1e-30]) * 1e-10).item()
    return {
        "total": total.item(),
        "rank": context.rank,
        "device": context.device.label,
        "threads": torch.get_num_threads(),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "tiny": tiny,
    }


def fail_on_rank_one(context: RankContext, error: BaseException) -> None:
    context.report(0)
    if context.rank == 1:
        raise error
    wait_for_next_rank(context)


def fail_with_a_class_that_pickle_cannot_read(context: RankContext) -> None:
    class NeedsTwo(Exception):  # noqa: N818
        def __init__(self, first: int, second: int) -> None:
            super().__init__(f"{first} and {second}")

    if context.rank == 1:
        raise NeedsTwo(1, 2)


def wait_for_next_rank(context: RankContext) -> None:
    """Every rank waits for its successor, so only the neighbour of a killed rank sees its end."""
    context.report(0)
    dist.recv(torch.zeros(1), src=(context.rank + 1) % context.size)


def compute_for_a_minute(context: RankContext) -> None:
    """Neither talks to a peer nor looks whether it should stop."""
    context.report(0)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        torch.rand(500, 500) @ torch.rand(500, 500)


def report_for_a_minute(context: RankContext) -> None:
    for step in range(6000):
        context.report(step)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    with local_cluster([Device("cpu"), Device("cpu", speed=0.5), Device("cpu")], dashboard=False) as client:
        yield client


@pytest.fixture
def client(cluster: Client) -> Iterator[Client]:
    """The cluster, checked before and after: complete, and nothing held."""
    assert len(discover(cluster)) == 3
    ports = listening_ports()
    yield cluster
    assert len(discover(cluster)) == 3
    assert_nothing_left(cluster)
    assert listening_ports() == ports


def listening_ports() -> set[int]:
    connections = psutil.Process().net_connections("tcp")
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


def scheduler_state(dask_scheduler: Any) -> dict[str, Any]:
    locks = dask_scheduler.extensions["semaphores"].leases
    return {
        "tasks": [str(key) for key in dask_scheduler.tasks],
        "used": {ws.name: {k: v for k, v in ws.used_resources.items() if v} for ws in dask_scheduler.workers.values()},
        "locks": [name for name, leases in locks.items() if leases],
    }


def assert_nothing_left(client: Client) -> None:
    deadline = time.monotonic() + 5
    while True:
        state = client.run_on_scheduler(scheduler_state)
        if not state["tasks"] and not any(state["used"].values()) and not state["locks"]:
            break
        assert time.monotonic() < deadline, state
        time.sleep(0.05)
    threads = client.run(lambda: [thread.name for thread in __import__("threading").enumerate()])
    assert not any("gang-watch" in names for names in threads.values())


def assert_next_run_works(client: Client, size: int = 3) -> None:
    results = run_gang(
        client, discover(client)[:size], sum_over_ranks, [(rank,) for rank in range(size)], label="the next run"
    )
    assert [result["total"] for result in results] == [sum(range(size))] * size


def process_of(client: Client, member: Member) -> int:
    return int(client.run(os.getpid, workers=[member.address])[member.address])


class Assault:
    """Progress callback that sends a signal to a process at the first report."""

    def __init__(self, pid: int, number: int) -> None:
        self.pid, self.number, self.time = pid, number, 0.0

    def __call__(self, _step: int, _values: dict[str, float]) -> None:
        if not self.time:
            self.time = time.monotonic()
            os.kill(self.pid, self.number)


def test_every_rank_returns_what_it_computed_together_with_the_others(client: Client) -> None:
    reports: list[tuple[int, dict[str, float]]] = []
    results = run_gang(
        client,
        discover(client),
        sum_over_ranks,
        [(1.0,), (2.0,), (4.0,)],
        label="sum",
        on_progress=lambda step, values: reports.append((step, values)),
    )
    assert [result["rank"] for result in results] == [0, 1, 2]
    assert [result["total"] for result in results] == [7.0] * 3
    assert [result["device"] for result in results] == ["cpu", "cpu@0.5", "cpu"]
    assert {result["threads"] for result in results} == {1}
    assert {result["tiny"] for result in results} == {0.0}
    assert all(result["interface"].startswith("lo") for result in results)
    assert reports[-1] == (2, {"loss": pytest.approx(1 / 3)})


def test_a_gang_of_one_needs_no_group_and_takes_scattered_arguments(client: Client) -> None:
    value = client.scatter(5.0)
    member = select(discover(client), [Device("cpu", speed=0.25)])
    [result] = run_gang(client, member, sum_over_ranks, [(value,)], label="alone")
    assert (result["total"], result["device"]) == (5.0, "cpu@0.25")


def test_a_gang_holds_its_workers_for_itself(client: Client) -> None:
    held: list[bool] = []

    def try_to_take(_step: int, _values: dict[str, float]) -> None:
        lock = Lock("pipeline device cpu:1", scheduler_rpc=client.scheduler, loop=client.loop)
        held.append(not lock.acquire(timeout=0.1))

    run_gang(client, discover(client), sum_over_ranks, [(0.0,)] * 3, label="sum", on_progress=try_to_take)
    assert held
    assert all(held)


def test_a_rank_that_raises_ends_the_gang_in_its_error(client: Client) -> None:
    members = discover(client)
    start = time.monotonic()
    with pytest.raises(RunError) as caught:
        run_gang(client, members, fail_on_rank_one, [(ValueError("boom"),)] * 3, label="training 50:500")
    assert time.monotonic() - start < 5
    expected = (
        f"rank 1 on worker cpu:1 (cpu@0.5 at {members[1].address}) failed during training 50:500: ValueError: boom"
    )
    assert str(caught.value) == expected
    assert isinstance(caught.value.__cause__, ValueError)
    assert "fail_on_rank_one" in caught.value.__cause__.__notes__[0]
    assert_next_run_works(client)


def test_an_error_of_this_package_stays_what_it_is(client: Client) -> None:
    with pytest.raises(InputError) as caught:
        run_gang(
            client,
            discover(client),
            fail_on_rank_one,
            [(InputError("the batch is too large."),)] * 3,
            label="training",
        )
    assert str(caught.value) == "the batch is too large."
    assert "raised by worker cpu:1" in caught.value.__notes__[0]


def test_an_error_that_pickle_cannot_read_still_arrives_as_text(client: Client) -> None:
    with pytest.raises(RunError, match="NeedsTwo: 1 and 2"):
        run_gang(client, discover(client), fail_with_a_class_that_pickle_cannot_read, [()] * 3, label="training")


def test_a_function_that_workers_cannot_read_is_one_error(client: Client) -> None:
    with pytest.raises(RunError, match="failed during reading"):
        run_gang(client, discover(client), UnreadableOnWorkers(), [()] * 3, label="reading")


class UnreadableOnWorkers:
    def __call__(self, context: RankContext) -> None:
        raise AssertionError(context)

    def __reduce__(self) -> Any:
        return (int, ("not a number",))


@pytest.mark.parametrize("function", [wait_for_next_rank, compute_for_a_minute], ids=["blocked", "computing"])
def test_a_killed_worker_ends_the_gang_in_one_error(client: Client, function: Callable[..., None]) -> None:
    members = discover(client)
    assault = Assault(process_of(client, members[2]), signal.SIGKILL)
    with pytest.raises(RunError, match=rf"^worker cpu:2 \(cpu at {re.escape(members[2].address)}\) was lost"):
        run_gang(client, members, function, [()] * 3, label="training", on_progress=assault)
    assert time.monotonic() - assault.time < 15
    assert_next_run_works(client)


def test_a_stopped_worker_ends_the_gang_within_its_timeout(client: Client) -> None:
    members = discover(client)
    pid = process_of(client, members[1])
    assault = Assault(pid, signal.SIGSTOP)
    with pytest.raises(RunError, match=r"^worker cpu:1 .* stopped answering during training, and was restarted"):
        run_gang(client, members, wait_for_next_rank, [()] * 3, label="training", timeout_s=2, on_progress=assault)
    assert time.monotonic() - assault.time < 15
    assert not psutil.pid_exists(pid)
    assert_next_run_works(client)


def test_ctrl_c_in_the_driver_ends_every_rank(client: Client) -> None:
    assault = Assault(os.getpid(), signal.SIGINT)
    workers = client.run(os.getpid)
    with pytest.raises(KeyboardInterrupt):
        run_gang(client, discover(client), wait_for_next_rank, [()] * 3, label="training", on_progress=assault)
    assert time.monotonic() - assault.time < 5
    assert client.run(os.getpid) == workers, "ranks that can hear the stop order keep their process"
    assert_next_run_works(client)


def test_a_worker_lost_before_the_launch_ends_it() -> None:
    with local_cluster([Device("cpu")] * 2, dashboard=False) as client:
        members = discover(client)
        client.retire_workers([members[0].address])  # A killed one might be there again by then.
        with pytest.raises(RunError, match=r"worker cpu:0 .* was lost during training"):
            run_gang(client, members, sum_over_ranks, [(0.0,)] * 2, label="training")


def test_a_busy_worker_ends_the_launch_in_time_and_is_left_alone(client: Client) -> None:
    assert_next_run_works(client)  # A worker that was restarted has to import torch first, which takes its time.
    members = discover(client)
    workers = client.run(os.getpid)
    busy = client.submit(time.sleep, 6, workers=[members[1].address], resources={"CPU": 1}, pure=False)
    with pytest.raises(RunError, match=r"training could not begin within 1 s: worker cpu:1 .* did not start"):
        run_gang(client, members, sum_over_ranks, [(0.0,)] * 3, label="training", launch_timeout_s=1)
    assert busy.result(timeout=20) is None
    assert client.run(os.getpid) == workers
    del busy


DRIVER = """
import sys
import torch
import torch.distributed as dist
from pipeline.cluster.deployment import connect
from pipeline.cluster.devices import wait_for_members
from pipeline.cluster.gang import run_gang

def rank(context):
    step = 0
    while True:
        dist.all_reduce(torch.zeros(1))
        context.report(step)
        step += 1

if __name__ == "__main__":
    with connect(sys.argv[1]) as client:
        members = wait_for_members(client, 2)
        run_gang(client, members, rank, [(), ()], label="endless", on_progress=lambda *_: print("step", flush=True))
"""


def test_a_killed_driver_ends_its_ranks_and_frees_a_foreign_cluster(
    foreign_cluster: Callable[..., Path], tmp_path: Path
) -> None:
    file = foreign_cluster(*[["--name", name, "--resources", "CPU=1"] for name in ("a", "b")])
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__SCHEDULER__LOCKS__LEASE_TIMEOUT": "8s"}
    with subprocess.Popen([sys.executable, script, file], env=environment, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        while driver.stdout.readline() != "step\n":
            assert driver.poll() is None
        driver.kill()
    with connect(file) as client:
        assert_next_run_works(client, size=2)
        assert_nothing_left(client)


def test_a_killed_worker_of_a_foreign_cluster_is_no_endless_wait(foreign_cluster: Callable[..., Path]) -> None:
    tag = ["--resources", "CPU=1"]
    file = foreign_cluster(["--name", "a", *tag], ["--name", "b", *tag], ["--name", "c", "--no-nanny", *tag])
    with connect(file) as client:
        members = wait_for_members(client, 3)
        assault = Assault(process_of(client, members[2]), signal.SIGKILL)
        with pytest.raises(RunError, match=r"worker c .* was lost during training"):
            run_gang(client, members, wait_for_next_rank, [()] * 3, label="training", on_progress=assault)
        assert time.monotonic() - assault.time < 5
        assert_next_run_works(client, size=2)
        assert_nothing_left(client)


SCRIPT = """
import os, signal, sys
import torch
import torch.distributed as dist
from pipeline.cluster.deployment import local_cluster
from pipeline.cluster.devices import Device, discover
from pipeline.cluster.gang import run_gang
from pipeline.errors import RunError

def rank(context, action):
    context.report(0)
    if action == "raise" and context.rank == 1:
        raise ValueError("boom")
    if action == "die" and context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.recv(torch.zeros(1), src=(context.rank + 1) % context.size)

if __name__ == "__main__":
    try:
        with local_cluster([Device("cpu")] * 3) as client:
            for action in ("raise", "die"):
                try:
                    run_gang(client, discover(client), rank, [(action,)] * 3, label=action)
                except RunError as error:
                    print(error, flush=True)
            say = lambda *_: print("running", flush=True)
            run_gang(client, discover(client), rank, [("wait",)] * 3, label="wait", on_progress=say)
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_failures_and_ctrl_c_print_one_sentence_each_and_nothing_else(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does: to every process of the job.
    output, errors = process.communicate(timeout=20)
    assert "ValueError: boom" in lines[0]
    assert "was lost during die" in lines[1]
    assert (lines[2], output, errors) == ("running\n", "interrupted\n", "")
    assert not psutil.wait_procs(workers, timeout=2)[1]


def test_a_lost_scheduler_is_one_error(foreign_cluster: Callable[..., Path]) -> None:
    with connect(foreign_cluster(["--resources", "CPU=1"])) as client:
        members = wait_for_members(client, 1)
        assault = Assault(client.run_on_scheduler(os.getpid), signal.SIGKILL)
        with pytest.raises(RunError, match="scheduler of the cluster"):
            run_gang(client, members, report_for_a_minute, [()], label="training", on_progress=assault)
        assert time.monotonic() - assault.time < 10
