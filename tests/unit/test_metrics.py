"""Metrics without a cluster: what the accuracy counts, how batches are joined, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.errors import InputError, RunError
from pipeline.run.metrics import Scores, check_metrics


def accuracy(loss: Any, *batches: tuple[Any, Any]) -> float | None:
    scores = Scores(None, loss)
    for output, target in batches:
        scores.add(output, target, 1)
    return scores.values().get("accuracy")


X_BK = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 3.0, 2.0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_class_indices_are_compared_with_the_largest_output(dtype: torch.dtype) -> None:
    assert accuracy(nn.CrossEntropyLoss(), (X_BK, torch.tensor([0, 0], dtype=dtype))) == 0.5
    assert accuracy(nn.CrossEntropyLoss(), (X_BK, torch.tensor([[0], [1]], dtype=dtype))) == 1


def test_every_pixel_of_a_mask_counts_but_those_that_are_ignored() -> None:
    output = torch.zeros(1, 2, 2, 2)
    output[0, 1, 0] = 1
    target = torch.tensor([[[1, 0], [0, 255]]])
    assert accuracy(nn.CrossEntropyLoss(), (output, target)) == 0.5
    assert accuracy(nn.CrossEntropyLoss(ignore_index=255), (output, target)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("shape", [(2, 1), (2,)])
@pytest.mark.parametrize("kind", [torch.float32, torch.int64, torch.bool])
def test_one_logit_is_above_zero_where_the_label_holds(shape: tuple[int, ...], kind: torch.dtype) -> None:
    output = torch.tensor([[0.3], [0.2]])
    assert accuracy(nn.BCEWithLogitsLoss(), (output, torch.tensor([1, 0]).to(kind).view(shape))) == 0.5


def test_several_labels_count_each() -> None:
    target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert accuracy(nn.BCEWithLogitsLoss(), (X_BK, target)) == pytest.approx(4 / 6)
    assert accuracy(nn.BCELoss(), (X_BK.sigmoid(), target)) == pytest.approx(4 / 6)


def test_probabilities_of_the_classes_are_those_that_add_up_to_one_in_all_batches() -> None:
    soft = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.5, 0.4]])
    several = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    assert accuracy(F.cross_entropy, (X_BK, soft)) == 1
    assert accuracy(lambda output, target: (output - target).sum(), (X_BK, soft)) == 1
    one_hot = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    unknown = accuracy(lambda output, target: (output - target).sum(), (X_BK, one_hot), (X_BK, several))
    assert unknown == pytest.approx((4 + 4) / 12)


def test_of_several_outputs_and_labels_the_first_count() -> None:
    assert accuracy(None, ((X_BK, X_BK), {"kind": torch.tensor([0, 1]), "sex": torch.tensor([1, 1])})) == 1


@pytest.mark.parametrize(
    ("loss", "target"),
    [(nn.MSELoss(), torch.zeros(2, 3)), (None, torch.tensor([[2.5, 0, 0], [0, 0, 0]])), (None, torch.zeros(2, 7))],
)
def test_values_have_no_accuracy(loss: Any, target: torch.Tensor) -> None:
    assert accuracy(loss, (X_BK, target)) is None


def test_sums_are_divided_by_counts_and_means_are_weighted_by_images() -> None:
    scores = Scores({"sum": lambda x, y: (x.sum(), y), "mean": lambda x, _: x.mean(), "none": lambda *_: (0, 0)}, None)
    scores.add(torch.tensor([1.0, 2.0]), 4, 2)
    scores.add(torch.tensor([7.0]), 1, 1)
    found = scores.values()
    assert found["sum"] == 2
    assert found["mean"] == pytest.approx(10 / 3)
    assert math.isnan(found["none"])


def test_a_metric_that_returns_something_else_is_named() -> None:
    with pytest.raises(
        RunError, match=r"metric 'iou' returns Tensor of shape \(3,\): it must return a sum and a count"
    ):
        Scores({"iou": lambda *_: torch.zeros(3)}, None).add(X_BK, X_BK, 2)


@pytest.mark.parametrize(
    ("metrics", "monitor", "validates", "sentence"),
    [
        ({"loss": len}, None, True, "a metric cannot be called 'loss'"),
        ({"iou": 3}, None, True, "metric 'iou' is int: give a function"),
        ([len], None, True, "metrics is list: give a dictionary"),
        ({"iou": len}, None, False, "metric 'iou' has nothing to measure: give validation images"),
        ({"iou": len}, "accuracy", True, "monitor 'accuracy' is no metric: there are iou, loss"),
        (None, "accuracy", False, "monitor 'accuracy' has nothing to follow"),
    ],
)
def test_metrics_that_cannot_be_told_are_refused(
    metrics: Any, monitor: str | None, validates: bool, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        check_metrics(metrics, monitor, validates=validates)
