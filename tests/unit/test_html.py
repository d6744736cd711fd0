"""Plans and results as a notebook shows them."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
import xarray as xr

from pipeline.graph.trace import trace
from pipeline.html import table
from pipeline.networks import network
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.strategies import plan_network
from pipeline.training import FitResult

MODEL = network("4:6")


def plan(strategy: Strategy) -> Plan:
    return plan_network(
        trace(MODEL, torch.zeros(2, 3, 32, 32)), strategy, batch_size=8, labels=["cpu", "cpu@0.5"], shares=(0.5, 0.5)
    )


def rows(html: str) -> list[list[str]]:
    """The cells of all tables, which must be well-formed."""
    page = ET.fromstring(f"<body>{html}</body>")
    return [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]


def test_text_is_escaped() -> None:
    assert rows(table("a < b", ["x & y"], [["<b>"]])) == [["x & y"], ["<b>"]]


def test_a_plan_shows_each_operation_with_its_layouts() -> None:
    made = plan("kernel")
    shown = rows(made._repr_html_())
    assert [row[0] for row in shown] == ["operation", *(one.name for one in made.operations)]
    assert shown[1][2] == str(made.operations[0].output)
    assert "kernel over cpu, cpu@0.5, batch 8" in made._repr_html_()


def test_a_plan_of_equal_parts_says_so() -> None:
    assert "equal part of the batch" in plan("ddp")._repr_html_()


@pytest.mark.parametrize("validated", [True, False])
def test_a_result_shows_how_the_training_went_and_its_plan(validated: bool) -> None:
    history = xr.Dataset({"loss": ("step", np.array([2.5, 1.25]))})
    if validated:
        history["accuracy"] = "epoch", np.array([0.5, 0.75])
    result = FitResult(
        model=MODEL, history=history, timing=xr.Dataset({"step_time": ("step", np.array([0.1, 0.3]))}),
        plan=plan("kernel"), calibration=None, callbacks=(), loss=torch.nn.CrossEntropyLoss(),
    )  # fmt: skip
    shown = dict(row[:2] for row in rows(result._repr_html_()))
    assert shown["steps"] == "2, 0.2 s each (median)"
    assert shown["loss"] == "2.5000 at first, 1.2500 at last"
    assert shown.get("accuracy") == ("0.75 after 2 epochs" if validated else None)
    assert "kernel over" in result._repr_html_()
