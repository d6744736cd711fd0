"""Emulated links against real ones: two network namespaces joined by a virtual cable whose rate the kernel limits.

The scheduler, the client and the master live in one namespace, the other rank in the other; Dask and gloo have to talk
across. Making namespaces takes root, `ip` and `tc`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import xarray as xr

from pipeline.datasets import prepare
from pipeline.graph.trace import trace
from pipeline.links import parse_link
from pipeline.networks import network
from pipeline.results.stores import open_zip, write_zip
from pipeline.run.launch import example_batch
from pipeline.stored_images import StoredImages
from tests import synthetic

MEGABITS = 15
BUCKET = 2**16
"""In bytes."""
LINK = f"{MEGABITS}Mbit/s"
NETWORK, BATCH, REPETITIONS = "20:100", "32", "5"
STRATEGIES = ("kernel", "batch")
SUBNET = "10.213.77"
_PATIENCE_S = 60.0
_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def _unshaped() -> str:
    """Why real links cannot be made here; empty where they can."""
    if sys.platform != "linux" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "limiting a real link takes root on Linux"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"limiting a real link takes {' and '.join(missing)} (iproute2)"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return f"no network namespace can be made: {made.stderr.strip()}" if made.returncode else ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def _cable(megabits: int) -> Iterator[tuple[str, str]]:
    """Two namespaces with addresses ``SUBNET.1`` and ``SUBNET.2``, and a cable of so many Mbit/s each way."""
    names = f"near{os.getpid()}", f"far{os.getpid()}"
    with ExitStack() as stack:
        for name in names:
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "del", name)
        _run(
            "ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]
        )
        for number, name in enumerate(names, 1):
            inside = ("ip", "-n", name)
            _run(*inside, "addr", "add", f"{SUBNET}.{number}/24", "dev", "cable")
            _run(*inside, "link", "set", "lo", "up")
            # Large frames, as the rate counts headers, too.
            _run(*inside, "link", "set", "cable", "mtu", "9000", "up")
            shape = ("root", "tbf", "rate", f"{megabits}mbit", "burst", f"{BUCKET}b", "latency", "400ms")
            _run("tc", "-n", name, "qdisc", "add", "dev", "cable", *shape)
        yield names


@contextmanager
def _started(*command: str, folder: Path) -> Iterator[None]:
    with subprocess.Popen(
        command, cwd=folder, env=_ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _benchmark(*options: str, folder: Path, within: tuple[str, ...] = ()) -> dict[str, xr.Dataset]:
    """The cells of a benchmark, by strategy."""
    output = folder / "cells"
    clock = ("--rounds", "1", "--repetitions", REPETITIONS, "--seconds", "0")
    chosen = [part for strategy in STRATEGIES for part in ("--strategy", strategy)]
    command = [*within, sys.executable, "-m", "pipeline", "benchmark", "--network", NETWORK, "--batch-size", BATCH]
    command += [*clock, *chosen, *options, "--output", str(output)]
    done = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return {strategy: open_zip(output / f"{strategy}.zarr.zip") for strategy in STRATEGIES}


@pytest.mark.skipif(bool(_unshaped()), reason=_unshaped())
def test_a_step_over_an_emulated_link_takes_as_long_as_over_a_real_one(tmp_path: Path) -> None:
    for name in ("real", "emulated"):
        (tmp_path / name).mkdir()
    data = tmp_path / "digits.zarr.zip"
    prepare("digits", data, root=tmp_path, progress=False)
    images = StoredImages(data, "train")
    model = network(NETWORK, classes=len(images.classes), image_shape=images.image_shape)
    # One calibration for both, or they would run different plans; nothing but the plans depends on it.
    invented = synthetic.calibration_of(trace(model, example_batch(images)), ("cpu", "cpu"))
    common = ("--data", str(data), "--calibration", str(write_zip(invented, tmp_path / "calibration.zarr.zip")))
    with _cable(MEGABITS) as (near, far), ExitStack() as stack:
        inside = {name: ("ip", "netns", "exec", name) for name in (near, far)}
        file = tmp_path / "cluster.json"
        scheduler = (sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", f"{SUBNET}.1", "--port", "0")
        stack.enter_context(
            _started(*inside[near], *scheduler, "--no-dashboard", "--scheduler-file", str(file), folder=tmp_path)
        )
        waited = time.monotonic() + _PATIENCE_S
        while not file.exists():
            assert time.monotonic() < waited, "the scheduler did not start"
            time.sleep(0.1)
        for number, name in enumerate((near, far)):
            worker = (
                sys.executable,
                "-m",
                "distributed.cli.dask_worker",
                "--scheduler-file",
                str(file),
                "--nthreads",
                "1",
            )
            options = ("--resources", "CPU=1", "--name", f"cpu:{number}", "--host", f"{SUBNET}.{number + 1}")
            stack.enter_context(_started(*inside[name], *worker, *options, "--no-dashboard", folder=tmp_path))
        # Both workers first, or the benchmark would take the one that is there for all there are.
        waiting = f"from distributed import Client; Client(scheduler_file={str(file)!r}).wait_for_workers(2, 60)"
        _run(*inside[near], sys.executable, "-c", waiting)
        real = _benchmark(*common, "--scheduler", str(file), folder=tmp_path / "real", within=inside[near])
    emulated = _benchmark(*common, "--devices", "2 x cpu", "--link", LINK, folder=tmp_path / "emulated")
    link = parse_link(LINK)
    assert link is not None
    for strategy in STRATEGIES:
        # What else the machine does only adds to a step.
        there, here = (float(cells[strategy].step_time.min()) for cells in (real, emulated))
        print(f"{strategy}: real {there:.3f} s, emulated {here:.3f} s ({here / there - 1:+.1%})")
        # The link is what a step waits for, so that the test does not depend on the machine's speed.
        moved = float(emulated[strategy].instruction_bytes.sum()) / link.bandwidth / 2
        assert there > 0.5 * moved
        # A real link lets up to a bucketful through at once after a pause, which the emulated one does not.
        assert 0.9 * there < here < 1.1 * there + 2 * BUCKET / link.bandwidth
