"""Every rule of the table of operators against the operator itself: an entry changes nothing but its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.graph.axes import Operand, Shapes, kept_axes, operands_of
from pipeline.graph.capture import Captured, capture
from pipeline.graph.copies import Inputs
from pipeline.graph.interpret import Caller, run_all
from pipeline.graph.nodes import Form, Node
from pipeline.graph.sources import without_examples
from pipeline.graph.writes import without_writes

IMAGES = 3
OPERATIONS: dict[str, Any] = {
    "relu": lambda x, _: x.relu(),
    "add": lambda x, y: x + y,
    "broadcast": lambda x, _: x * x.mean((2, 3), keepdim=True),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "hardswish": lambda x, _: F.hardswish(x),
    "mean": lambda x, _: x.mean((2, 3)),
    "mean of images": lambda x, _: x.mean(0),
    "sum": lambda x, _: x.sum(1, keepdim=True),
    "amax": lambda x, _: x.amax((1, 3)),
    "max": lambda x, _: x.max(1)[0],
    "var_mean": lambda x, _: torch.var_mean(x, 1)[0],
    "norm": lambda x, _: F.normalize(x, dim=1),
    "softmax": lambda x, _: x.softmax(1),
    "log_softmax": lambda x, _: x.log_softmax(-1),
    "cumsum": lambda x, _: x.cumsum(1),
    "flip": lambda x, _: x.flip(1),
    "flip of images": lambda x, _: x.flip(0),
    "roll": lambda x, _: torch.roll(x, 1, 3),
    "roll of all": lambda x, _: torch.roll(x, 1),
    "cat": lambda x, y: torch.cat([x, y], 1),
    "stack": lambda x, y: torch.stack([x, y], 1),
    "chunk": lambda x, _: x.chunk(2, 1)[0],
    "unbind": lambda x, _: x.unbind(2)[0],
    "select": lambda x, _: x[:, 1],
    "slice": lambda x, _: x[:, :, 1:3],
    "permute": lambda x, _: x.permute(0, 2, 3, 1).relu(),
    "transpose": lambda x, _: x.transpose(1, 3).relu(),
    "movedim": lambda x, _: x.movedim(1, -1).relu(),
    "view": lambda x, _: x.view(x.shape[0], 4, 36),
    "flatten": lambda x, _: x.flatten(1),
    "fold": lambda x, _: x.reshape(x.shape[0] * 4, 6, 6),
    "fold and back": lambda x, _: x.reshape(x.shape[0] * 4, 36).softmax(-1).reshape(x.shape[0], 4, 6, 6),
    "windows": lambda x, _: x.view(-1, 4, 2, 3, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, 4),
    "unsqueeze": lambda x, _: x.unsqueeze(1),
    "squeeze": lambda x, _: x[:, :1].squeeze(1),
    "expand": lambda x, _: x[:, :1].expand(-1, 4, -1, -1),
    "repeat": lambda x, _: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x, _: x.repeat_interleave(2, 1),
    "pad": lambda x, _: F.pad(x, (1, 0, 0, 2)),
    "pad channels": lambda x, _: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "reflect": lambda x, _: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "circular": lambda x, _: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "max_pool": lambda x, _: F.max_pool2d(x, 2),
    "avg_pool": lambda x, _: F.avg_pool2d(x, 3, 1, 1),
    "adaptive": lambda x, _: F.adaptive_avg_pool2d(x, 2),
    "adaptive max": lambda x, _: F.adaptive_max_pool2d(x, 2),
    "pool of an image": lambda x, _: F.max_pool2d(x[:, 0], 2),
    "bilinear": lambda x, _: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "nearest": lambda x, _: F.interpolate(x, size=(9, 9)),
    "pixel_shuffle": lambda x, _: F.pixel_shuffle(x, 2),
    "channel_shuffle": lambda x, _: F.channel_shuffle(x, 2),
    "unfold": lambda x, _: F.unfold(x, 3),
    "windows by unfold": lambda x, _: x.unfold(2, 2, 2),
    "grid_sample": lambda x, y: F.grid_sample(x, y[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
    "group_norm": lambda x, _: F.group_norm(x, 2),
    "layer_norm": lambda x, _: F.layer_norm(x, (6, 6)),
    "instance_norm": lambda x, _: F.instance_norm(x),
    "batch_norm": lambda x, _: F.batch_norm(x, None, None, training=True),
    "matmul": lambda x, y: x @ y,
    "bmm": lambda x, y: x.flatten(2) @ y.flatten(2).transpose(1, 2),
    "einsum": lambda x, y: torch.einsum("bchw,bdhw->bcd", x, y),
    "einsum over images": lambda x, y: torch.einsum("bchw,bdhw->cd", x, y),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, y),
    "glu": lambda x, _: F.glu(x, 1),
    "gather": lambda x, y: x.gather(1, y.argsort(1)),
    "sort": lambda x, _: x.sort(1)[0],
    "topk": lambda x, _: x.topk(2, 1)[0],
    "index": lambda x, _: x[:, torch.tensor([0, 2])],
    "index apart": lambda x, _: x[:, torch.tensor([0, 2]), :, torch.tensor([0, 2])],
    "prelu": lambda x, _: F.prelu(x, torch.full((4,), 0.1, dtype=x.dtype)),
    "put in": lambda x, _: _with_row(x),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "logsumexp": lambda x, _: x.logsumexp(1),
    "sequence first": lambda x, _: x.flatten(2).permute(2, 0, 1).softmax(-1),
    "linear": lambda x, _: F.linear(x, torch.ones(5, 6, dtype=x.dtype)),
    "convolution": lambda x, _: F.conv2d(x, torch.ones(5, 4, 3, 3, dtype=x.dtype)),
}
MIXING = {"flip of images", "mean of images", "roll of all", "einsum over images", "index apart"}
"""Where images meet, so that nothing may be said to keep their axis."""


def _with_row(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y[:, 1] = x[:, 2]
    return y


class _All(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        return [OPERATIONS[name](x, y) for name in self.names]


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    torch.manual_seed(0)
    return Inputs((torch.randn(IMAGES, 4, 6, 6).double(), torch.randn(IMAGES, 4, 6, 6).double()), {})


def _captured(name: str, inputs: Inputs) -> Captured:
    return without_examples(without_writes(capture(_All([name]), inputs, {})))


def _forms(captured: Captured) -> tuple[dict[str, Form], dict[str, Form]]:
    forms = dict(zip(captured.inputs, captured.forms, strict=True))
    forms.update({node.name: node.results[0] for node in captured.nodes if node.results})
    weights = {
        name: Form(tuple(one.shape), one.dtype, tuple(range(one.dim()))) for name, one in captured.constants.items()
    }
    return forms, weights


def test_what_is_said_to_be_kept_is_kept(inputs: Inputs) -> None:
    captured = without_examples(without_writes(capture(_All(list(OPERATIONS)), inputs, {})))
    forms = _forms(captured)
    values: dict[str, Any] = dict(zip(captured.inputs, inputs.tensors, strict=True))
    run_all(captured.nodes, values, captured.constants, {}, IMAGES)
    checked = 0
    for node in captured.nodes:
        operands = operands_of(node, *forms)
        kept = kept_axes(Shapes(node, operands, node.results[0])) if node.results else None
        for operand, axes in zip(operands, kept or (), strict=False):
            for axis, place in axes.items():
                checked += _check(node, operand, axis, place, values, captured)
    assert checked > 200


def _check(node: Node, operand: Operand, axis: int, place: int, values: dict[str, Any], captured: Captured) -> bool:
    """Change what is at the last index of a kept axis: the rest of the result stays as it was."""
    tensors = {**captured.constants, **values}
    before = tensors[operand.name]
    if not isinstance(before, torch.Tensor) or not before.is_floating_point() or before.shape[axis] < 2:
        return False
    caller = Caller(node)
    result = _first(caller(values.__getitem__, captured.constants.__getitem__, IMAGES))
    images = (
        IMAGES if before.shape[axis] % IMAGES == 0 and result.shape[place] != before.shape[axis] else before.shape[axis]
    )
    each, shown = before.shape[axis] // images, result.shape[place] // images
    after = before.clone()
    after.narrow(axis, before.shape[axis] - each, each).add_(torch.rand(()) + 0.5)
    changed = {**tensors, operand.name: after}
    if (
        node.values.count(operand.name)
        and sum(one.name == operand.name for one in operands_of(node, *_forms(captured))) > 1
    ):
        return False
    found = _first(caller(changed.__getitem__, lambda name: changed[name], IMAGES))
    rest = result.shape[place] - shown
    assert torch.equal(found.narrow(place, 0, rest), result.narrow(place, 0, rest)), (node.target, axis, place)
    return True


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple | list) else result


@pytest.mark.parametrize("name", sorted(MIXING))
def test_where_images_meet_nothing_keeps_their_axis(name: str, inputs: Inputs) -> None:
    captured = _captured(name, inputs)
    last = captured.nodes[-1]
    kept = kept_axes(Shapes(last, operands_of(last, *_forms(captured)), last.results[0]))
    assert kept is None or not any(0 in axes for axes in kept)
