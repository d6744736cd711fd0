"""Plans travel as JSON, and what does not belong together is refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xarray as xr

import pipeline
from pipeline.errors import InputError
from pipeline.graph.trace import trace
from pipeline.networks import network
from pipeline.plan.checks import check_calibration, check_plan
from pipeline.plan.files import plan_from_json, plan_to_json, read_plan
from pipeline.plan.plan import Plan
from pipeline.plan.strategies import plan_network

LABELS = ("cpu", "cpu@0.5")


@pytest.fixture(scope="module")
def plan() -> Plan:
    graph = trace(network("6:10"), torch.zeros(2, 3, 32, 32))
    return plan_network(graph, "kernel", batch_size=8, labels=LABELS, shares=(0.7, 0.3))


def test_a_plan_survives_the_way_through_a_file(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_to_json(plan), encoding="utf-8")
    assert read_plan(path) == plan
    last = replace(plan, channels_last=True)
    assert plan_from_json(plan_to_json(last)) == last != plan


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strategy": "best"}, "p.json is not a plan: strategy"),
        ({"devices": [0]}, r"devices \[0\] and labels .* must be one each"),
        ({"devices": [0, 1, 2], "labels": ["cpu"] * 3}, "conv1 has shares for 2 of 3 devices"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"colour": "red"}, "colour"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_broken_plan_is_refused(plan: Plan, change: dict[str, object], says: str) -> None:
    text = json.dumps(json.loads(plan_to_json(plan)) | change)
    with pytest.raises(InputError, match=says) as error:
        plan_from_json(text, "p.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"kind": "M", "shares": [0, 1]}, "M is all on the first rank"),
        ({"kind": "B", "shares": [3, 3]}, "splits 6 images for conv2, but its batch size is 8"),
        ({"kind": "K", "shares": [3, 3]}, "splits 6 channels of conv2, which has 10"),
        ({"kind": "R", "shares": [2, 1]}, "in layout R: write 1 or 0"),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_a_layout_that_cannot_be_is_refused(plan: Plan, layout: dict[str, object], says: str) -> None:
    content = json.loads(plan_to_json(plan))
    next(one for one in content["operations"] if one["name"] == "conv2")["output"] = layout
    changed = plan_from_json(json.dumps(content))
    with pytest.raises(InputError, match=says):
        check_plan(changed, trace(network("6:10"), torch.zeros(2, 3, 32, 32)), LABELS)


def test_what_is_no_plan_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no text"):
        read_plan(tmp_path / "binary.json")
    with pytest.raises(InputError, match="is not a plan"):
        plan_from_json("no json", "p.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_plan(tmp_path / "nothing.json")


def test_a_plan_for_another_model_or_other_devices_is_refused(plan: Plan) -> None:
    shape = torch.zeros(2, 3, 32, 32)
    check_plan(plan, trace(network("6:10"), shape), LABELS)
    with pytest.raises(InputError, match="another model: it splits 6 channels of conv1, which has 7"):
        check_plan(plan, trace(network("7:10"), shape), LABELS)
    with pytest.raises(InputError, match="another model: the two differ in"):
        check_plan(plan, trace(network("resnet18"), shape), LABELS)
    with pytest.raises(InputError, match=r"needs device 1 \(cpu@0.5\), but there are only 1"):
        check_plan(plan, trace(network("6:10"), shape), LABELS[:1])
    with pytest.raises(InputError, match=r"device 1 is cpu@0.5 in the plan, but gpu here"):
        check_plan(plan, trace(network("6:10"), shape), ("cpu", "gpu"))


@pytest.fixture
def calibration() -> xr.Dataset:
    """As if 6:10 had been measured, in round numbers."""
    from tests import synthetic

    graph = trace(network("6:10"), torch.zeros(2, 3, 32, 32))
    return synthetic.calibration_of(graph, LABELS)


def test_a_calibration_of_something_else_is_refused(calibration: xr.Dataset) -> None:
    shape = torch.zeros(2, 3, 32, 32)
    graph = trace(network("6:10"), shape)
    check_calibration(calibration, graph, LABELS)
    with pytest.raises(InputError, match=r"another network .*conv1 has 6 kernels, this one's 8"):
        check_calibration(calibration, trace(network("8:10"), shape), LABELS)
    with pytest.raises(InputError, match="another network"):
        check_calibration(calibration, trace(network("resnet18"), shape), LABELS)
    with pytest.raises(InputError, match=r"images of \[3, 32, 32\], but these are of \[3, 48, 48\]"):
        check_calibration(
            calibration, trace(network("6:10", image_shape=(3, 48, 48)), torch.zeros(2, 3, 48, 48)), LABELS
        )
    with pytest.raises(InputError, match=r"is of cpu, cpu@0.5, but the devices are cpu, gpu"):
        check_calibration(calibration, graph, ("cpu", "gpu"))
    older = calibration.assign_attrs(versions="python 3.11.7, torch 1.13.0+cpu")
    with pytest.raises(InputError, match=r"made with torch 1.13, but this is torch 2"):
        check_calibration(older, graph, LABELS)


def test_a_simulated_step_has_the_form_of_a_measured_one(calibration: xr.Dataset) -> None:
    model = network("6:10")
    plan = pipeline.make_plan(model, calibration, batch_size=8, strategy="kernel")
    timing = pipeline.simulate(plan, calibration)
    assert timing.sizes == {"step": 1, "kept_step": 1, "device": 2, "instruction": timing.sizes["instruction"]}
    assert timing.step_time.item() == pytest.approx(float(timing.instruction_end.max()))
    assert timing.attrs["simulated"]
    slower = pipeline.simulate(plan, calibration, latency=1e-3, bandwidth=1e6)
    assert slower.step_time.item() > timing.step_time.item()


def test_simulating_what_cannot_be_is_refused(calibration: xr.Dataset) -> None:
    plan = pipeline.make_plan(network("6:10"), calibration, batch_size=8, strategy="kernel")
    with pytest.raises(InputError, match=r"bandwidth -1.0 bytes/s must be positive"):
        pipeline.simulate(plan, calibration, latency=0.0, bandwidth=-1.0)
    with pytest.raises(InputError, match=r"latency -1.0 s must not be negative"):
        pipeline.simulate(plan, calibration, latency=-1.0, bandwidth=1.0)
    with pytest.raises(InputError, match="needs both"):
        pipeline.simulate(plan, calibration, latency=1.0)
    unknown = plan_from_json(plan_to_json(plan))
    with pytest.raises(InputError, match="give simulate its model="):
        pipeline.simulate(unknown, calibration)
    assert pipeline.simulate(unknown, calibration, model=network("6:10")).step_time.item() > 0
