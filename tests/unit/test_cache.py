"""Which calibrations of earlier runs are used again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xarray as xr

from pipeline.calibration.cache import Curves, cached
from pipeline.calibration.measure import CalibrationWarning, _usable
from pipeline.cluster.devices import Device, Member
from pipeline.graph.trace import trace
from pipeline.networks import network
from tests import synthetic

MEMBERS = tuple(
    Member(name=name, address=f"tcp://a:{place}", host="a", device=Device("cpu"), hardware="a processor", memory=2**30)
    for place, name in enumerate(("first", "second"))
)


def _times_measured(folder: Path, *runs: tuple[Member, ...], incomplete: bool = False) -> int:
    """How often one network is measured for these devices, one after the other."""
    measured: list[Curves] = []

    def measure(known: Curves) -> xr.Dataset:
        measured.append(known)
        found = synthetic.calibration()
        return found.assign_attrs(incomplete=1) if incomplete else found

    for members in runs:
        found = cached(folder, ["conv1"], ["5x5"], members, (8, 16), (0.5, 1.0), 2, measure, force=False)
        assert found.forward_time.equals(synthetic.calibration().forward_time)
    return len(measured)


def test_a_calibration_is_found_again(tmp_path: Path) -> None:
    elsewhere = tuple(replace(one, name="w", address="tcp://b:9", host="b") for one in MEMBERS)
    assert _times_measured(tmp_path, MEMBERS, MEMBERS, elsewhere) == 1


@pytest.mark.parametrize("change", [{"host": "b"}, {"memory": 2**31}, {"hardware": "another"}], ids=str)
def test_other_devices_or_as_many_on_other_hosts_are_measured(tmp_path: Path, change: dict[str, object]) -> None:
    apart = (MEMBERS[0], replace(MEMBERS[1], **change))  # type: ignore[arg-type]
    assert _times_measured(tmp_path, MEMBERS, apart, MEMBERS, apart) == 2


def test_an_incomplete_calibration_is_measured_anew(tmp_path: Path) -> None:
    assert _times_measured(tmp_path, MEMBERS, MEMBERS, incomplete=True) == 2


def test_more_repetitions_are_measured(tmp_path: Path) -> None:
    asked: list[int] = []

    def found(repetitions: int) -> xr.Dataset:
        def measure(known: Curves) -> xr.Dataset:
            assert not known, "curves of fewer repetitions do not serve either"
            asked.append(repetitions)
            return synthetic.calibration()

        return cached(tmp_path, ["conv1"], ["conv1"], MEMBERS, (8, 16), (0.5, 1.0), repetitions, measure, force=False)

    assert "cached" not in found(2).attrs
    assert "cached" not in found(10).attrs
    assert "cached" in found(2).attrs
    assert asked == [2, 10]


def test_a_calibration_that_no_plan_can_be_made_of_is_not_kept() -> None:
    graph = trace(network("4:8"), torch.zeros(2, 3, 32, 32))
    calibration = synthetic.calibration_of(graph, ["cpu", "cpu"])
    assert "incomplete" not in _usable(calibration, graph, "4:8").attrs
    calibration.forward_time.loc[{"device": 1, "share": 0.25}] = 1.0
    with pytest.warns(CalibrationWarning, match="the calibration of 4:8 is not kept, as no plan can be made of it: .*"):
        assert _usable(calibration, graph, "4:8").attrs["incomplete"] == 1
