"""Local clusters and clusters of others, with real processes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from distributed import Client

from pipeline.cluster.deployment import ALLOCATOR, connect, local_cluster
from pipeline.cluster.devices import Device, discover, wait_for_members
from pipeline.errors import InputError, RunError

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).resolve().parents[2]


def listening_addresses() -> set[tuple[str, int]]:
    addresses: set[tuple[str, int]] = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # One that an earlier test stopped may end just now.
            connections = process.net_connections("tcp")
            addresses |= {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}
    return addresses


def is_running(process: int) -> bool:
    """Whether it is there and no zombie, which orphans may remain in a container."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    return False


forked = pytest.mark.skipif(sys.platform != "linux", reason="workers are spawned, and load torch by themselves")


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_cluster([Device("cpu"), Device("cpu", threads=2, speed=0.5)]) as client:
        yield client


def test_every_device_is_a_tagged_worker_that_knows_its_device(client: Client) -> None:
    members = discover(client)
    assert [(member.name, member.device.label) for member in members] == [("cpu:0", "cpu"), ("cpu:1", "cpu*2t@0.5")]
    assert all("usable cores" in member.hardware and member.host == "127.0.0.1" for member in members)
    workers = client.scheduler_info()["workers"]
    assert [workers[member.address]["resources"] for member in members] == [{"CPU": 1}, {"CPU": 1}]


def test_the_allocator_is_set_before_a_worker_starts_and_each_knows_its_threads(client: Client) -> None:
    environments = {
        member.name: psutil.Process(pid).environ()
        for member in discover(client)
        for pid in [client.run(os.getpid, workers=[member.address])[member.address]]
    }
    # /proc shows what the process was started with: a later change would not reach the allocator.
    assert all(ALLOCATOR.items() <= environment.items() for environment in environments.values())
    threads = client.run(os.getenv, "OMP_NUM_THREADS")
    assert [threads[member.address] for member in discover(client)] == ["1", "2"]


def test_a_cluster_without_a_block_lasts_until_it_is_closed() -> None:
    before = {name: os.environ.get(name) for name in ALLOCATOR}
    cluster = local_cluster([Device("cpu")], dashboard=False)
    workers = list(cluster.run(os.getpid).values())
    assert [member.name for member in discover(cluster)] == ["cpu:0"]
    assert all(map(is_running, workers))
    cluster.close()
    assert not any(map(is_running, workers))
    assert {name: os.environ.get(name) for name in ALLOCATOR} == before
    cluster.close()


def test_a_cluster_that_nobody_closes_ends_with_its_process(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "import pipeline\n"
        "if __name__ == '__main__':\n"
        "    cluster = pipeline.local_cluster([pipeline.Device('cpu')], dashboard=False)\n"
        "    print(*cluster.run(os.getpid).values())\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(is_running(int(worker)) for worker in done.stdout.split())


def what_is_loaded() -> list[str]:
    return [name for name in ("torch", "torch._dynamo", "sympy") if name in sys.modules]


@forked
def test_torch_is_loaded_once_for_all_workers() -> None:
    with local_cluster([Device("cpu")] * 2, dashboard=False) as client:
        assert list(client.run(what_is_loaded).values()) == [["torch", "torch._dynamo", "sympy"]] * 2
        parents = client.run(os.getppid)
        assert len(set(parents.values())) == 1
    with local_cluster([Device("cpu")], dashboard=False) as client:
        assert list(client.run(os.getppid).values()) == list(parents.values())[:1]


@forked
def test_the_end_of_what_workers_are_forked_from_is_survived() -> None:
    with local_cluster([Device("cpu")] * 2, dashboard=False) as client:
        workers = list(client.run(os.getpid).values())
        (parent,) = set(client.run(os.getppid).values())
        assert parent != os.getpid()
        os.kill(parent, signal.SIGKILL)
        end = time.monotonic() + 20
        while any(map(is_running, workers)):
            assert time.monotonic() < end, "workers outlive what they were forked from"
            time.sleep(0.1)
        assert len(discover(client)) == 2
        assert not set(client.run(os.getpid).values()) & set(workers)


@forked
def test_no_worker_hears_ctrl_c() -> None:
    with local_cluster([Device("cpu")] * 2, dashboard=False) as client:
        workers = client.run(os.getpid)
        for worker in workers.values():
            os.kill(worker, signal.SIGINT)
        time.sleep(0.2)
        assert client.run(os.getpid) == workers


def fresh_pages() -> list[int]:
    """How many pages the system had to give in each of some training steps, whose tensors are of 20 MiB and more."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU())
    x_BCHW = torch.ones(32, 3, 100, 100)
    found = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model(x_BCHW).sum().backward()
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return found


def test_a_rank_gets_the_memory_again_that_it_has_freed(client: Client) -> None:
    """In a task, as ranks are: threads other than the first would by themselves have fresh pages every time."""
    pages = client.submit(fresh_pages, pure=False).result()
    assert pages[0] > 100  # of huge ones; thousands of small ones
    assert min(pages[-3:]) < 0.1 * pages[0]


def test_everything_listens_on_loopback_only(client: Client) -> None:
    assert client.dashboard_link.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(client.dashboard_link.replace("/status", "/health"), timeout=10) as answer:
        assert answer.status == 200
    addresses = listening_addresses()
    assert len(addresses) >= 4
    assert {host for host, _ in addresses} == {"127.0.0.1"}


def test_a_killed_worker_is_waited_for(client: Client) -> None:
    victim = discover(client)[1]
    os.kill(client.run(os.getpid)[victim.address], signal.SIGKILL)
    members = discover(client)
    assert [member.name for member in members] == ["cpu:0", "cpu:1"]
    assert members[1].device == victim.device
    with pytest.raises(RunError, match="3 devices within"):
        wait_for_members(client, 3, timeout_s=0.1)


def test_a_stopped_worker_is_reported_in_bounded_time(client: Client) -> None:
    pid = client.run(os.getpid)[discover(client)[0].address]
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(RunError, match="did not answer within 1 s"):
            discover(client, timeout_s=1)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert len(discover(client)) == 2


def test_a_closed_cluster_leaves_nothing_even_with_a_worker_freshly_killed() -> None:
    environment, ports = dict(os.environ), listening_addresses()
    with local_cluster([Device("cpu")] * 2, dashboard=False) as client:
        workers = list(client.run(os.getpid).values())
        assert all(map(is_running, workers))
        os.kill(workers[0], signal.SIGKILL)
    assert not any(map(is_running, workers))
    assert listening_addresses() == ports
    changed = {name for name, _ in dict(os.environ).items() ^ environment.items()}
    assert changed <= {"__DASK_PARENT_PID"}  # Dask's own, set for good with the first cluster of a process


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="GPU 99 was asked for"), local_cluster([Device("gpu", index=99)]):
        pass
    with pytest.raises(InputError, match="at least one device"), local_cluster([]):
        pass


def test_foreign_workers_are_found_by_their_tags(foreign_cluster: Callable[..., Path]) -> None:
    file = foreign_cluster(["--name", "b", "--resources", "CPU=1"], ["--name", "a", "--resources", "CPU=1"], [])
    with connect(file) as client:
        members = wait_for_members(client, 2)
        assert [(member.name, member.device) for member in members] == [("a", Device("cpu")), ("b", Device("cpu"))]
    with connect(json.loads(file.read_text())["address"]) as client:
        assert len(discover(client)) == 2


def test_a_cluster_without_tags_is_refused_at_once(foreign_cluster: Callable[..., Path]) -> None:
    with connect(foreign_cluster([])) as client:
        client.wait_for_workers(1, timeout=30)
        start = time.monotonic()
        with pytest.raises(InputError, match="no worker of the cluster carries a CPU or GPU resource"):
            discover(client)
        assert time.monotonic() - start < 2


def test_an_unreachable_scheduler_is_refused_in_time(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(InputError, match="no Dask scheduler answers"), connect(address, timeout_s=2):
        pass
    assert time.monotonic() - start < 4
    for wrong in ("nonsense://x", "", tmp_path / "missing.json"):
        with pytest.raises(InputError), connect(wrong, timeout_s=1):
            pass
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(InputError, match="not the scheduler file"), connect(tmp_path / "other.json"):
        pass


SCRIPT = """
import os, signal, sys, time
from pipeline.cluster.deployment import local_cluster
from pipeline.cluster.devices import Device

if __name__ == "__main__":
    try:
        with local_cluster([Device("cpu")] * 2) as client:
            print(*client.run(os.getpid).values(), flush=True)
            time.sleep(60 if "wait" in sys.argv else 0)
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_a_script_with_a_cluster_ends_silently(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-X", "dev", "-W", "error", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=40, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_ctrl_c_ends_a_script_and_its_workers_silently(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), "wait"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does: to every process of the job.
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (0, "interrupted\n", "")
    assert len(workers) == 2
    assert not any(psutil.pid_exists(worker) for worker in workers)
