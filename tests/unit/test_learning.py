"""Split training beside one device's: differences, the spread over seeds, what rounding explains, and their words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr

from pipeline.accuracy import one_rounding_away
from pipeline.analysis import learning
from pipeline.analysis.accuracy_figure import accuracy_over_epochs
from pipeline.analysis.accuracy_findings import accuracy_finding
from pipeline.networks import network
from tests import synthetic


@pytest.fixture
def accuracy() -> xr.Dataset:
    """Three seeds whose `single` ends at 68, 70 and 73 %; `paper` differs by 1.25 points in one epoch of one seed."""
    found = synthetic.accuracy()
    found["accuracy"][:] = np.linspace(0.1, 0.7, 6)
    found["accuracy"] += xr.DataArray([-0.02, 0, 0.03], dims="seed")
    found["accuracy"].loc[{"seed": 1, "strategy": "paper", "epoch": 4}] += 0.0125
    found["accuracy"].loc[{"seed": 2, "strategy": "kernel", "epoch": 6}] -= 0.005
    return found


def test_the_difference_is_that_to_single_of_the_same_seed(accuracy):
    apart = learning.accuracy_difference(accuracy)
    assert apart.dims == ("seed", "strategy", "epoch")
    assert apart.sel(seed=1, strategy="paper", epoch=4).item() == pytest.approx(0.0125)
    assert np.count_nonzero(np.abs(apart) > 1e-12) == 2


def test_the_spread_is_the_range_of_single_over_the_seeds(accuracy):
    np.testing.assert_allclose(learning.seed_spread(accuracy), 0.05)


def test_losses_are_compared_relative_to_single(accuracy):
    single = accuracy["loss"].sel(strategy="single", drop=True)
    accuracy["loss"].loc[{"strategy": "kernel"}] = single * (1 - 2e-6)
    apart = learning.loss_difference(accuracy)
    np.testing.assert_allclose(apart.sel(strategy="kernel"), 2e-6, rtol=1e-6)


def test_the_bound_is_the_control_s_difference_in_quadrature_over_the_first_steps_alone(accuracy):
    single = accuracy["loss"].sel(strategy="single", drop=True)
    factor = xr.where(accuracy["step"] < learning.FIRST_STEPS, 1 + 3e-6, 1.5)
    accuracy["control_loss"] = (single * factor).transpose("seed", "step")
    assert learning.rounding_bound(accuracy) == pytest.approx(math.sqrt(100) * 3e-6)


def test_the_finding_says_the_numbers_of_the_store(accuracy):
    said = accuracy_finding(accuracy)
    assert "mean of 3 seeds: ``single`` 70.33%" in said
    assert "split accuracy: 0.50 percentage points after the last epoch, 1.25 after any" in said
    assert "Spread of ``single`` over seeds: 5.00 after the last epoch, up to 5.00 after any. Splitting changes" in said
    assert "no more than another seed does" in said
    assert "So the difference is what rounding makes" in said


def test_the_finding_says_when_splitting_changes_more_than_seeds_and_rounding_do(accuracy):
    accuracy["accuracy"].loc[{"strategy": "kernel"}] += 0.2
    accuracy["loss"].loc[{"strategy": "kernel"}] *= 1.01
    said = accuracy_finding(accuracy)
    assert "Splitting changes the accuracy more than another seed does" in said
    assert "So the difference is more than what rounding makes" in said


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"seed": [0]}, "A spread over seeds takes more than one seed"),
        ({"strategy": ["paper", "kernel"]}, "``paper``"),
        ({"strategy": ["single"]}, "``single``"),
        ({"step": [0]}, "in the first 1 steps"),
    ],
    ids=["one seed", "without single", "single alone", "one step"],
)
def test_less_than_a_full_comparison_still_gives_a_figure_and_a_sentence(accuracy, chosen, words):
    part = accuracy.isel({k: v for k, v in chosen.items() if k != "strategy"})
    part = part.sel(strategy=chosen["strategy"]) if "strategy" in chosen else part
    assert words in accuracy_finding(part)
    assert "nan" not in accuracy_finding(part)
    accuracy_over_epochs(part).draw_without_rendering()


def test_one_rounding_moves_every_weight_to_a_neighbour_and_leaves_the_model_alone():
    model = network("4:8", image_shape=(1, 16, 16))
    before = [weight.detach().clone() for weight in model.parameters()]
    moved = list(one_rounding_away(model, seed=0).parameters())
    ups = 0
    for old, given, new in zip(before, model.parameters(), moved, strict=True):
        assert torch.equal(old, given)
        neighbours = [torch.nextafter(old, torch.full_like(old, sign * torch.inf)) for sign in (-1, 1)]
        assert torch.all((new == neighbours[0]) | (new == neighbours[1]))
        ups += int((new == neighbours[1]).sum())
    assert 0 < ups < sum(weight.numel() for weight in before)
