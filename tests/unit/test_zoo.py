"""What the zoo says of a network; the networks themselves are trained by `make zoo` only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.zoo import results
from tests.zoo.judging import is_fault, judge, worse
from tests.zoo.networks import NETWORKS
from tests.zoo.specimen import trimmed
from tests.zoo.training import Trained, move


def test_differences_within_the_tolerance_are_exact():
    assert judge({"loss 0": 1e-14, "weight": 1e-9}, {}) == "exact"


def test_a_difference_that_moved_weights_make_too_is_rounding():
    assert judge({"loss 0": 1e-14, "weight": 1e-6}, {"loss 0": 1e-15, "weight": 2e-8}) == "rounding"


@pytest.mark.parametrize("difference", [1e-6, math.inf])
def test_one_amplified_tensor_excuses_no_other(difference):
    assert judge({"one": 1e-6, "other": difference}, {"one": 1e-6, "other": 1e-14}) == "wrong"


def test_the_worst_verdict_of_both_strategies_counts():
    assert worse(["exact", "rounding"]) == "rounding"
    assert worse(["wrong", "exact"]) == "wrong"


def test_a_refusal_is_a_fault_unless_a_reason_is_on_the_table():
    assert is_fault({"verdict": "refused"}, "")
    assert not is_fault({"verdict": "refused"}, "torch itself cannot copy it")
    assert is_fault({"verdict": "crashed"}, "torch itself cannot copy it")


def test_a_tensor_that_is_no_number_is_infinitely_far_off():
    right = Trained([1.0], {"weight": torch.ones(2)})
    assert Trained([1.0], {"weight": torch.tensor([1.0, math.nan])}).apart(right)["weight"] == math.inf
    assert Trained([1.0, 1.0], {"weight": torch.ones(2)}).apart(right) == {"what there is": math.inf}


def test_a_moved_weight_is_one_rounding_off():
    model = nn.Linear(3, 3).double()
    before = model.weight.detach().clone()
    move(model, 0)
    off = (model.weight.detach() / before - 1).abs()
    assert off.min() > 0
    assert off.max() <= 2 * torch.finfo(torch.float64).eps


def test_equal_blocks_in_a_row_are_dropped_and_different_ones_kept():
    model = nn.Sequential(
        nn.Linear(2, 3), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    )
    assert [name for name, _ in trimmed(model, 1).named_children()] == ["0", "1", "2", "3"]


def test_records_are_read_again_up_to_where_an_interruption_left_them(tmp_path):
    path = tmp_path / "outputs" / "zoo.jsonl"
    results.append(path, {"network": "one", "verdict": "wrong"})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"network": "tw')
    results.append(path, {"network": "one", "verdict": "exact"})
    assert results.read(path) == {"one": {"network": "one", "verdict": "exact"}}


def test_a_row_of_the_table_has_as_many_cells_as_its_head():
    record = {
        "network": "timm some", "package": "timm", "version": "1", "note": "", "parameters": 10, "capture_s": 1.0,
        "opaque": [("a", "x | y")], "difference": {"kernel": 1e-7, "batch": 0.0}, "moved": {"kernel": 1e-8},
        "split": {"kernel": 0.95, "batch": 1.0}, "farthest": {}, "verdict": "rounding",
    }  # fmt: skip
    head, _, row = results.table([record]).strip().splitlines()[-3:]
    assert head.count("|") == row.count("|")
    assert "| 1e-07 (1e-08) | 0e+00 | 0.95 / 1.00 | a: x / y | 1.0 | rounding |" in row


def test_networks_of_six_packages_can_be_listed_without_these_packages():
    assert len({specimen.package for specimen in NETWORKS.values()}) == 6
    assert len(NETWORKS) >= 125
