"""Devices as text, default devices, and the choice of members; no cluster is started here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster import devices as module
from pipeline.cluster.devices import (
    Device,
    Member,
    default_devices,
    format_device_set,
    parse_device_set,
    real_devices,
    select,
)
from pipeline.errors import InputError

DEVICES = st.one_of(
    st.builds(Device, st.just("cpu"), threads=st.integers(1, 64), speed=st.floats(0.001, 1.0)),
    st.builds(Device, st.just("gpu"), threads=st.integers(1, 8), speed=st.floats(0.001, 1.0), index=st.integers(0, 7)),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("cpu", [Device("cpu")], id="one CPU"),
        pytest.param("cpu*2t@0.5", [Device("cpu", threads=2, speed=0.5)], id="threads and speed"),
        pytest.param("2 x cpu@0.45", [Device("cpu", speed=0.45)] * 2, id="a repeated device"),
        pytest.param("cpu + cpu@0.5", [Device("cpu"), Device("cpu", speed=0.5)], id="unequal devices"),
        pytest.param("gpu + 2xcpu", [Device("gpu"), Device("cpu"), Device("cpu")], id="no space around the x"),
        pytest.param(
            "2 x gpu1", [Device("gpu", index=1), Device("gpu", index=2)], id="repeated GPUs are different GPUs"
        ),
    ],
)
def test_a_device_set_is_read(text: str, expected: list[Device]) -> None:
    assert parse_device_set(text) == tuple(expected)


@given(st.lists(DEVICES, min_size=1, max_size=8))
def test_every_device_set_survives_its_text_form(devices: list[Device]) -> None:
    assert parse_device_set(format_device_set(devices)) == tuple(devices)


def test_equal_neighbours_are_written_once_and_order_is_kept() -> None:
    devices = [Device("cpu"), Device("cpu"), Device("cpu", speed=0.5), Device("cpu")]
    assert format_device_set(devices) == "2 x cpu + cpu@0.5 + cpu"


@pytest.mark.parametrize(
    "text", ["", "tpu", "cpu3", "0 x cpu", "cpu@", "cpu@0", "cpu@1.5", "cpu@.-", "cpu*0t", "cpu +", "-1 x cpu"]
)
def test_what_is_not_a_device_set_is_named(text: str) -> None:
    with pytest.raises(InputError):
        parse_device_set(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "tpu"},
        {"kind": "cpu", "threads": 0},
        {"kind": "cpu", "threads": 1.5},
        {"kind": "cpu", "speed": 0},
        {"kind": "cpu", "speed": 2},
        {"kind": "cpu", "speed": float("nan")},
        {"kind": "cpu", "index": 1},
        {"kind": "gpu", "index": -1},
    ],
    ids=str,
)
def test_a_device_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Device(**fields)


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        pytest.param(2, "4 x cpu@0.45", id="fewer cores than devices are emulated"),
        pytest.param(4, "4 x cpu", id="a core each"),
        pytest.param(10, "4 x cpu*2t", id="cores are shared evenly"),
    ],
)
def test_default_cpu_devices_fit_the_cores(monkeypatch: pytest.MonkeyPatch, cores: int, expected: str) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: cores)
    monkeypatch.setattr(module, "visible_gpus", lambda: 0)
    assert format_device_set(default_devices()) == expected
    assert parse_device_set("default") == default_devices()


def test_default_devices_take_every_gpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: 4)
    monkeypatch.setattr(module, "visible_gpus", lambda: 2)
    assert format_device_set(default_devices()) == "gpu + gpu1 + 4 x cpu"


@pytest.mark.parametrize(
    ("cores", "gpus", "expected"),
    [
        (1, 0, "cpu"),
        (2, 0, "2 x cpu"),
        (2, 1, "gpu + 2 x cpu"),
        (4, 2, "gpu + gpu1 + 4 x cpu"),
        (10, 0, "2 x cpu*3t + 2 x cpu*2t"),
    ],
)
def test_real_devices_are_all_gpus_and_all_cores_unslowed(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int, expected: str
) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: cores)
    monkeypatch.setattr(module, "visible_gpus", lambda: gpus)
    assert format_device_set(real_devices()) == expected


def test_worker_names_are_ordered_as_people_count() -> None:
    names = ["cpu:10", "gpu:0", "cpu:2", "tcp://10.0.0.1:5"]
    assert sorted(names, key=module._natural_order) == ["cpu:2", "cpu:10", "gpu:0", "tcp://10.0.0.1:5"]


def members(text: str) -> list[Member]:
    return [
        Member(name=f"w{rank}", address=f"tcp://host:{rank}", host="host", device=device, hardware="test", memory=2**34)
        for rank, device in enumerate(parse_device_set(text))
    ]


def test_members_are_chosen_by_count_or_by_device() -> None:
    cluster = members("cpu@0.5 + cpu + gpu")
    assert select(cluster, 2) == tuple(cluster[:2])
    assert select(cluster, parse_device_set("gpu + cpu@0.5")) == (cluster[2], cluster[0])


def test_a_real_device_stands_in_for_an_emulated_one_but_never_the_other_way_round() -> None:
    cluster = members("2 x cpu")
    chosen = select(cluster, parse_device_set("cpu@0.5 + cpu"))
    assert [member.device.label for member in chosen] == ["cpu@0.5", "cpu"]
    assert dataclasses.replace(chosen[0], device=cluster[1].device) == cluster[1]
    with pytest.raises(InputError, match="2 x cpu"):
        select(members("2 x cpu@0.5"), parse_device_set("2 x cpu"))


@pytest.mark.parametrize(
    "wanted", [0, 3, parse_device_set("3 x cpu"), parse_device_set("gpu"), parse_device_set("cpu*2t")]
)
def test_more_than_the_cluster_has_is_refused(wanted: Any) -> None:
    with pytest.raises(InputError, match="2: '2 x cpu'"):
        select(members("2 x cpu"), wanted)
