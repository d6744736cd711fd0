"""How well a model does on the validation images: the accuracy, or metrics of the user's own, by epoch.

Shape suffixes: B images, K classes or labels.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from pipeline.data.batches import moved
from pipeline.errors import InputError, RunError

Metric = Callable[[Any, Any], Any]
"""From what the model returns for a batch, and its target, to a sum and a count, or to a mean over the images."""

ACCURACY = "accuracy"
LOSS = "loss"
"""The mean loss of the training images."""
_TAKEN = (LOSS, "step", "epoch")
"""Names that a history has for something else."""
_BY_LABEL = (nn.BCEWithLogitsLoss, nn.BCELoss, nn.MultiLabelSoftMarginLoss)
_BY_LABEL_FUNCTIONS = (F.binary_cross_entropy_with_logits, F.binary_cross_entropy, F.multilabel_soft_margin_loss)
_OF_VALUES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
_OF_VALUES_FUNCTIONS = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
_ROUNDING = 1e-3
"""By how much probabilities of all classes may differ from 1 in sum, in half precision."""


def check_metrics(metrics: Mapping[str, Metric] | None, monitor: str | None, *, validates: bool) -> None:
    """Raise ``InputError`` for metrics that cannot be told, or a ``monitor`` that is none of them."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise InputError(f"metrics is {type(metrics).__name__}: give a dictionary of names and functions")
    for name, function in (metrics or {}).items():
        if not name or name in _TAKEN or type(name) is not str:
            raise InputError(f"a metric cannot be called {name!r}: take a name other than {', '.join(_TAKEN)}")
        if not callable(function):
            raise InputError(
                f"metric '{name}' is {type(function).__name__}: give a function of output and target that returns a "
                "sum and a count, or a mean"
            )
    if metrics and not validates:
        raise InputError(f"metric '{next(iter(metrics))}' has nothing to measure: give validation images")
    if monitor is None or monitor == LOSS:
        return
    known = tuple(metrics) if metrics is not None else (ACCURACY,)
    if monitor not in known:
        raise InputError(f"monitor '{monitor}' is no metric: there are {', '.join((*known, LOSS))}")
    if not validates:
        raise InputError(f"monitor '{monitor}' has nothing to follow: give validation images")


class Scores:
    """The metrics of one pass over the validation images."""

    def __init__(self, metrics: Mapping[str, Metric] | None, loss: Any) -> None:
        """The accuracy where ``metrics`` is None; ``loss`` tells what labels are."""
        self._metrics = metrics
        self._accuracy = Accuracy(loss) if metrics is None else None
        self._sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in metrics or {}}

    def add(self, output: Any, target: Any, images: int) -> None:
        """Take up a batch of so many images: what the model returned, and its target."""
        first = next((one for one in pytree.tree_leaves(output) if isinstance(one, torch.Tensor)), None)
        if first is not None:
            target = moved(target, first.device)
        with torch.no_grad():
            if self._accuracy is not None:
                self._accuracy.add(output, target)
            for name, function in (self._metrics or {}).items():
                total, count = _sum_and_count(name, function(output, target), images)
                self._sums[name][0] += total
                self._sums[name][1] += count

    def values(self) -> dict[str, float]:
        """Each metric over all batches; NaN where nothing was counted. No accuracy where labels are no classes."""
        if self._accuracy is not None:
            value = self._accuracy.value()
            return {} if value is None else {ACCURACY: value}
        return {name: total / count if count else math.nan for name, (total, count) in self._sums.items()}


def _sum_and_count(name: str, value: Any, images: int) -> tuple[float, float]:
    if isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_number, value)):
        return float(value[0]), float(value[1])
    if _is_number(value):
        return float(value) * images, float(images)
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    raise RunError(
        f"metric '{name}' returns {type(value).__name__}{shape}: it must return a sum and a count, or a mean"
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, numbers.Real) or (hasattr(value, "item") and getattr(value, "size", 0) == 1)


class Accuracy:
    """The fraction of labels that are right, of the first output and the first target where there are several.

    - Whole numbers: one class of K for each image, or for each pixel of a mask, as cross-entropy takes them; what it
      ignores does not count.
    - As many targets as outputs: labels that hold or not (logit above 0, target above 0.5); but where the targets of
      every image are probabilities of the classes, whose sum is 1, the largest of both.

    A loss by labels, or by classes, decides where the targets fit both. Values have no accuracy.
    """

    def __init__(self, loss: Any) -> None:
        """``loss`` is what the model is trained by."""
        function = getattr(loss, "func", loss)
        self._by_label = isinstance(loss, _BY_LABEL) or any(function is one for one in _BY_LABEL_FUNCTIONS)
        self._by_class = isinstance(loss, nn.CrossEntropyLoss) or function is F.cross_entropy
        self._threshold = 0.5 if isinstance(loss, nn.BCELoss) or function is F.binary_cross_entropy else 0.0
        self._of_values = isinstance(loss, _OF_VALUES) or any(function is one for one in _OF_VALUES_FUNCTIONS)
        ignored = getattr(loss, "ignore_index", None)
        self._ignored = ignored if isinstance(ignored, int) else -100
        self._labels, self._classes = [0, 0], [0, 0]
        """Right and counted ones, if targets are labels and if they are classes."""
        self._are_probabilities = True

    def add(self, output: Any, target: Any) -> None:
        """Count those of a batch."""
        scores, labels = (
            next((one for one in pytree.tree_leaves(tree) if isinstance(one, torch.Tensor)), None)
            for tree in (output, target)
        )
        if scores is None or labels is None or not scores.dim() or not labels.dim() or scores.is_complex():
            return
        if labels.dtype == torch.bool:
            labels = labels.to(torch.uint8)
        if labels.shape != scores.shape:
            scores, labels = _alike(scores, labels)
        if labels.shape == scores.shape:
            self._add_alike(scores, labels)
        elif scores.dim() > 1 and labels.shape == (scores.shape[0], *scores.shape[2:]) and not labels.is_complex():
            self._count(self._classes, scores.argmax(1) == labels, labels != self._ignored)

    def _add_alike(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Targets of the outputs' shape."""
        if self._of_values or bool(((labels < 0) | (labels > 1)).any()):
            self._of_values = True
            return
        right = (scores > self._threshold) == (labels > 0.5)
        self._count(self._labels, right, torch.ones_like(right))
        several = scores.dim() > 1 and scores.shape[1] > 1
        if several:
            chosen = scores.argmax(1) == labels.argmax(1)
            self._count(self._classes, chosen, torch.ones_like(chosen))
        sums_to_1 = several and bool(((labels.sum(1).double() - 1).abs() < _ROUNDING).all())
        self._are_probabilities = self._are_probabilities and sums_to_1

    @staticmethod
    def _count(into: list[int], right: torch.Tensor, counts: torch.Tensor) -> None:
        into[0] += int((right & counts).sum())
        into[1] += int(counts.sum())

    def value(self) -> float | None:
        """The fraction of right ones; None where nothing could be counted."""
        if self._of_values:
            return None
        by_label = self._labels[1] > 0 and not self._by_class and (self._by_label or not self._are_probabilities)
        right, counted = self._labels if by_label else self._classes
        if not counted and self._labels[1]:
            right, counted = self._labels
        return right / counted if counted else None


def _alike(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with the same axes, where one of them has an axis of length 1 for classes, and the other none."""
    for one, other in ((0, 1), (1, 0)):
        given = [scores, labels]
        if given[one].dim() == given[other].dim() + 1 and given[one].shape[1] == 1:
            given[one] = given[one].squeeze(1)
            return given[0], given[1]
    if labels.dim() == scores.dim() and labels.dim() > 1 and labels.shape[1] == 1:
        return scores, labels.squeeze(1)
    return scores, labels
