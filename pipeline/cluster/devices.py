"""Devices: what one Dask worker owns, how a set of them is written, and which ones a cluster has.

A device is written `cpu`, `cpu@0.45` (emulated at 0.45 of its speed), `cpu*2t` (two threads), `cpu*2t@0.5`, `gpu`
(CUDA ordinal 0) or `gpu1`, and with a cap on its memory `cpu[900MiB]` or `gpu@0.5[8GiB]`. A device set joins devices
with ` + ` and repeats them with `N x `: `gpu + 4 x cpu@0.45`. `N x gpu` means N different GPUs, with successive
ordinals.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import groupby
from typing import Any, Literal, cast

from distributed import Client, Worker
from distributed.system import MEMORY_LIMIT

from pipeline.errors import InputError, RunError
from pipeline.memory_sizes import MEMORY_SIZE, MIB, parse_memory_size
from pipeline.processor import processor_text, usable_cores

DEVICE_VARIABLE = "PIPELINE_DEVICE"
"""The environment variable by which a worker of `local_cluster` knows its device, as JSON."""

_DEVICE_PATTERN = re.compile(
    r"(?P<kind>cpu|gpu)(?P<index>\d+)?(?:\*(?P<threads>\d+)t)?(?:@(?P<speed>[0-9.e-]+))?"
    rf"(?:\[(?P<memory>{MEMORY_SIZE})\])?"
)
_TERM_PATTERN = re.compile(r"(?:(?P<count>\d+)\s*x\s*)?(?P<device>\S+)")
_POLL_S = 0.1
_ASK_AGAIN_S = 1.0


@dataclass(frozen=True)
class Device:
    """What one Dask worker owns: a set of CPU threads, or one GPU. Raises InputError for values out of range."""

    kind: Literal["cpu", "gpu"]
    """Which tag the worker carries and where its tensors live."""
    _: KW_ONLY
    threads: int = 1
    """Torch threads of the rank on this device."""
    speed: float = 1.0
    """Fraction of the real speed, in (0, 1]; below 1 the device is emulated by sleeping."""
    index: int = 0
    """CUDA ordinal among the GPUs visible to the driver; 0 for a CPU."""
    memory: int | None = None
    """The most bytes its process may hold (of a GPU, its tensors), whole MiB; None for all that is there."""

    def __post_init__(self) -> None:
        if self.kind not in ("cpu", "gpu"):
            raise InputError(f"device kind {self.kind!r} is unknown; use 'cpu' or 'gpu'.")
        _require_whole("threads", self.threads, least=1)
        _require_whole("index", self.index, least=0)
        if not _is_number(self.speed) or not 0 < self.speed <= 1:
            raise InputError(f"device speed must lie in (0, 1], not {self.speed!r}: a device can only be slowed down.")
        if self.memory is not None:
            _require_whole("memory", self.memory, least=MIB)
            if self.memory % MIB:
                raise InputError(f"device memory {self.memory} must be a whole number of MiB, 1048576 bytes each.")
        if self.kind == "cpu" and self.index:
            raise InputError(f"device index {self.index} is only for GPUs; leave it out for a CPU.")

    @property
    def emulated(self) -> bool:
        """Whether this device is a faster one that sleeps."""
        return self.speed < 1

    @property
    def resource(self) -> Literal["CPU", "GPU"]:
        """The Dask resource tag of the worker that owns this device."""
        return "GPU" if self.kind == "gpu" else "CPU"

    @property
    def label(self) -> str:
        """The text form, which `parse_device_set` reads back to an equal device."""
        index = str(self.index) if self.index else ""
        threads = f"*{self.threads}t" if self.threads > 1 else ""
        speed = f"@{float(self.speed)!r}" if self.emulated else ""
        memory = f"[{self.memory // MIB}MiB]" if self.memory is not None else ""
        return f"{self.kind}{index}{threads}{speed}{memory}"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A device placed on a Dask worker."""

    name: str
    """Name of the worker, which survives its restarts."""
    address: str
    """Dask address of the worker process; a restarted worker has another one."""
    host: str
    """Address of its network interface as the scheduler sees it."""
    device: Device
    """What the worker owns."""
    hardware: str
    """Model of the processor or GPU, as its operating system names it."""
    memory: int
    """The most bytes its process may hold: what its device says, else all of the machine or the GPU."""


def parse_device_set(text: str) -> tuple[Device, ...]:
    """Read a device set such as `gpu + 4 x cpu@0.45`; `default` stands for `default_devices()`."""
    if text.strip() == "default":
        return default_devices()
    return tuple(device for term in re.split(r"\s*\+\s*", text.strip()) for device in _parse_term(term, text))


def format_device_set(devices: Sequence[Device]) -> str:
    """Write a device set in its one canonical form, in the order of the devices."""
    groups = [(label, len(list(group))) for label, group in groupby(devices, key=lambda device: device.label)]
    repeated = [
        # "2 x gpu" means two GPUs, so one GPU that is named twice has to be written out.
        [label] * count if count == 1 or label.startswith("gpu") else [f"{count} x {label}"]
        for label, count in groups
    ]
    return " + ".join(term for terms in repeated for term in terms)


def default_devices(cpu_count: int = 4) -> tuple[Device, ...]:
    """Every visible GPU, then `cpu_count` CPU devices that together fit the cores this process may use.

    With fewer cores than CPU devices each one is emulated, at a speed that leaves a tenth of the machine free.
    """
    if cpu_count < 0:
        raise InputError(f"the number of CPU devices must be at least 0, not {cpu_count}.")
    gpus = tuple(Device("gpu", index=index) for index in range(visible_gpus()))
    if not cpu_count:
        return gpus
    cores = usable_cores()
    if cores >= cpu_count:
        return gpus + (Device("cpu", threads=cores // cpu_count),) * cpu_count
    return gpus + (Device("cpu", speed=math.floor(0.9 * cores / cpu_count * 100) / 100),) * cpu_count


def real_devices(most_cpus: int = 4) -> tuple[Device, ...]:
    """Every visible GPU, then CPU devices that share all cores, none of them slowed down: one a core, up to so many."""
    gpus, cores = default_devices(0), usable_cores()
    count = min(most_cpus, cores)
    threads, more = divmod(cores, count)
    return gpus + tuple(Device("cpu", threads=threads + (place < more)) for place in range(count))


def visible_gpus() -> int:
    """The number of CUDA devices this process sees, without creating a CUDA context."""
    import torch  # A second of import time that commands without GPUs in question should not pay.

    return torch.cuda.device_count()


def discover(client: Client, *, timeout_s: float = 10.0) -> tuple[Member, ...]:
    """List the devices of a cluster in the natural order of its worker names (`cpu:2` before `cpu:10`).

    A worker that `local_cluster` started and that is being restarted is waited for, at most `timeout_s`.

    Raises InputError where no worker carries a CPU or GPU resource, or a worker lacks this package; RunError where the
    scheduler or a worker does not answer within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    expected = {str(name) for name in getattr(client.cluster, "worker_spec", {})}
    while True:
        workers = _tagged_workers(client, timeout_s)
        answers = _ask_workers(client, list(workers), timeout_s) if workers else {}
        # A worker that was lost a moment ago is still listed, but does not answer.
        missing = (expected - {str(workers[address]["name"]) for address in answers}) or (workers.keys() - answers)
        if not missing or time.monotonic() >= deadline:
            break
        time.sleep(_POLL_S)
    if not answers:
        raise InputError(
            "no worker of the cluster carries a CPU or GPU resource; start them with --resources CPU=1 or GPU=1."
        )
    members = [_member(address, workers[address], answer) for address, answer in answers.items()]
    return tuple(sorted(members, key=lambda member: _natural_order(member.name)))


def wait_for_members(client: Client, count: int, *, timeout_s: float = 30.0) -> tuple[Member, ...]:
    """Wait until the cluster has at least `count` devices, and list them as `discover` does.

    Raises RunError when they are not there within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while len(_tagged_workers(client, timeout_s)) < count:
        if time.monotonic() >= deadline:
            raise RunError(f"the cluster did not have {count} devices within {timeout_s:g} s.")
        time.sleep(_POLL_S)
    return discover(client, timeout_s=timeout_s)


def select(members: Sequence[Member], wanted: int | Sequence[Device]) -> tuple[Member, ...]:
    """Choose the members to run on: the first `wanted` ones, or one for each wanted device, in that order.

    A device that no member equals is emulated on, or given, a real one of its kind with enough threads.

    Raises InputError where the cluster has too few.
    """
    if isinstance(wanted, int):
        if not 1 <= wanted <= len(members):
            raise InputError(f"{wanted} devices were asked for, but the cluster has {_describe(members)}.")
        return tuple(members[:wanted])
    free = list(members)
    # Exact matches first, so that a device that is to be emulated does not take the real one another needs.
    chosen = [_take(free, [member for member in free if member.device == device]) for device in wanted]
    for position, device in enumerate(wanted):
        if chosen[position] is None:
            real = _take(free, [member for member in free if _can_play(member.device, device)])
            if real is None:
                raise InputError(
                    f"the device set '{format_device_set(wanted)}' does not fit the cluster, "
                    f"which has {_describe(members)}."
                )
            chosen[position] = dataclasses.replace(real, device=device, memory=device.memory or real.memory)
    return tuple(cast("list[Member]", chosen))


def _parse_term(term: str, text: str) -> Iterator[Device]:
    matched = _TERM_PATTERN.fullmatch(term)
    device = _DEVICE_PATTERN.fullmatch(matched["device"]) if matched else None
    if matched is None or device is None:
        raise InputError(
            f"{term!r} in the device set {text!r} is not a device; write for example 'cpu', '4 x cpu@0.45', "
            "'cpu*2t', 'cpu[900MiB]', 'gpu' or 'gpu + 4 x cpu'."
        )
    kind: Literal["cpu", "gpu"] = "gpu" if device["kind"] == "gpu" else "cpu"
    count = int(matched["count"] or 1)
    if count < 1:
        raise InputError(f"{term!r} in the device set {text!r} asks for no device; the count must be at least 1.")
    try:
        speed = float(device["speed"] or 1)
    except ValueError:
        raise InputError(f"{device['speed']!r} in the device set {text!r} is not a speed, such as 0.45.") from None
    memory = parse_memory_size(device["memory"]) if device["memory"] else None
    first = Device(
        kind, threads=int(device["threads"] or 1), speed=speed, index=int(device["index"] or 0), memory=memory
    )
    for position in range(count):
        yield dataclasses.replace(first, index=first.index + position) if kind == "gpu" else first


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_whole(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"device {name} must be a whole number of at least {least}, not {value!r}.")


def _natural_order(name: str) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _tagged_workers(client: Client, timeout_s: float) -> dict[str, dict[str, Any]]:
    workers = scheduler_workers(client, timeout_s)
    return {
        address: worker
        for address, worker in workers.items()
        if worker["resources"].get("GPU", 0) >= 1 or worker["resources"].get("CPU", 0) >= 1
    }


def scheduler_workers(client: Client, timeout_s: float) -> dict[str, dict[str, Any]]:
    """Dask's own description of every worker by address, fresh from the scheduler; RunError where it is lost."""

    async def ask() -> dict[str, Any]:
        if client.scheduler is None:
            raise OSError("the client is closed")
        return cast("dict[str, Any]", await asyncio.wait_for(client.scheduler.identity(n_workers=-1), timeout_s))

    try:
        return cast("dict[str, dict[str, Any]]", client.sync(ask)["workers"])
    except OSError as error:  # A timeout is one too.
        raise RunError(f"the scheduler of the cluster does not answer: {error!r}.") from error


def _ask_workers(client: Client, addresses: list[str], timeout_s: float) -> dict[str, Mapping[str, str]]:
    async def ask() -> dict[str, Any]:
        left = addresses
        while left:
            # Inside the loop `client.run` is a coroutine, so a stopped worker can be waited for in bounded time.
            answer = asyncio.ensure_future(client.run(describe_worker, workers=left, on_error="return"))
            try:
                while not (await asyncio.wait({answer}, timeout=_ASK_AGAIN_S))[0]:
                    # Nobody answers for a worker that was killed as it was asked: go on without it.
                    assert client.scheduler is not None
                    there = (await client.scheduler.identity(n_workers=-1))["workers"]
                    if set(left) - set(there):
                        break
                else:
                    return cast("dict[str, Any]", answer.result())
            finally:
                answer.cancel()
            left = [address for address in left if address in there]
        return {}

    async def ask_in_time() -> dict[str, Any]:
        return await asyncio.wait_for(ask(), timeout_s)

    try:
        answers = client.sync(ask_in_time)
    except TimeoutError:
        raise RunError(f"a worker of the cluster did not answer within {timeout_s:g} s; is it stopped?") from None
    for address, answer in answers.items():
        if isinstance(answer, ImportError):
            raise InputError(f"the worker at {address} cannot import what it needs: {answer}.") from answer
        if isinstance(answer, BaseException) and not isinstance(answer, OSError):
            raise RunError(f"the worker at {address} cannot describe its device: {answer!r}.") from answer
    # A worker that was lost since it was listed answers with an OSError: it is simply not there any more.
    return {address: answer for address, answer in answers.items() if not isinstance(answer, OSError)}


def describe_worker(dask_worker: Worker) -> dict[str, str]:
    """Runs on a worker: its device as `local_cluster` described it (empty elsewhere), and its hardware."""
    owns_gpu = dask_worker.state.total_resources.get("GPU", 0) >= 1
    hardware = _gpu_model() if owns_gpu else f"{processor_text()}, {usable_cores()} usable cores"
    memory = _gpu_memory() if owns_gpu else MEMORY_LIMIT
    return {"device": os.environ.get(DEVICE_VARIABLE, ""), "hardware": hardware, "memory": str(memory)}


def device_to_json(device: Device) -> str:
    """The device as it travels in a worker's environment."""
    return json.dumps(dataclasses.asdict(device))


def _gpu_model() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no usable GPU"


def _gpu_memory() -> int:
    import torch

    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0


def _member(address: str, worker: Mapping[str, Any], answer: Mapping[str, str]) -> Member:
    if answer["device"]:
        device = Device(**json.loads(answer["device"]))
    else:
        is_gpu = worker["resources"].get("GPU", 0) >= 1
        device = Device("gpu" if is_gpu else "cpu", threads=worker["nthreads"])
    name, host = str(worker["name"]), str(worker["host"])
    memory = device.memory or int(answer["memory"])
    return Member(name=name, address=address, host=host, device=device, hardware=answer["hardware"], memory=memory)


def _can_play(real: Device, wanted: Device) -> bool:
    same = (real.kind, real.index) == (wanted.kind, wanted.index)
    holds = real.memory is None or (wanted.memory is not None and wanted.memory <= real.memory)
    return same and holds and not real.emulated and real.threads >= wanted.threads


def _take(free: list[Member], candidates: Sequence[Member]) -> Member | None:
    if not candidates:
        return None
    free.remove(candidates[0])
    return candidates[0]


def _describe(members: Sequence[Member]) -> str:
    return f"{len(members)}: '{format_device_set([member.device for member in members])}'"
