"""What of a model is captured, and what stays whole because its calls would do something else."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from pipeline.graph.trace import Graph, trace


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - what torch calls it with
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return -gradient


class _Part(nn.Module):
    """A part of a network, with the test's own ``forward``."""

    def __init__(self, body: Callable[[_Part, torch.Tensor], Any]) -> None:
        super().__init__()
        self.body, self.conv = body, nn.Conv2d(4, 4, 3, padding=1)
        self.calls: list[int] = []
        self.register_buffer("kept", torch.zeros(1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


def _graph(part: nn.Module) -> Graph:
    torch.manual_seed(0)
    return trace(nn.Sequential(nn.Conv2d(3, 4, 3), part, nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 8, 8))


def _counted(part: _Part, x: torch.Tensor) -> torch.Tensor:
    part.calls.append(1)
    return x / len(part.calls)


def _hooked(_: _Part, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 3)
    return y


def _checkpointed(part: _Part, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(part.conv, x, use_reentrant=True)  # type: ignore[no-any-return]


LOST: dict[str, Callable[[_Part, torch.Tensor], Any]] = {
    "a backward of its own": lambda _, x: _Reversed.apply(x),
    "a hook of a tensor": _hooked,
    "calls that are counted": _counted,
    "a branch on values": lambda _, x: x if float(x.detach().mean()) < 9 else x / 2,
    "numbers of Python": lambda _, x: x * random.uniform(0.5, 1.5),
    "numbers of numpy": lambda _, x: x * float(np.random.uniform(0.5, 1.5)),  # noqa: NPY002
    "a branch on Python's numbers": lambda _, x: x if random.random() < 0.5 else x.tanh(),
}


@pytest.mark.parametrize("body", LOST.values(), ids=LOST)
def test_only_the_part_that_a_capture_would_change_stays_whole(body: Callable[[_Part, torch.Tensor], Any]) -> None:
    graph = _graph(_Part(body))
    assert [one.name for one in graph.opaque] == ["1"]
    assert graph.opaque[0].reason
    assert sum(one.convolution for one in graph.operations) == 2


def test_a_hook_that_changes_gradients_keeps_its_module_whole() -> None:
    part = _Part(lambda part, x: part.conv(x).relu())
    part.conv.register_full_backward_hook(lambda _, given, __: tuple(one * 2 for one in given))  # type: ignore[arg-type]
    assert [one.name for one in _graph(part).opaque] == ["1.conv"]


def _mean_kept(part: _Part, x: torch.Tensor) -> torch.Tensor:
    if part.training:
        with torch.no_grad():
            part.kept.mul_(0.9).add_(0.1 * x.mean((0, 2, 3), keepdim=True))
    return x - part.kept


_LAMBDA = lambda y: y.relu()  # noqa: E731 - as people write them
CAPTURED: dict[str, Callable[[_Part, torch.Tensor], Any]] = {
    "a hook that only looks": lambda part, x: part.conv(x),
    "a checkpoint": lambda part, x: checkpoint(part.conv, x, use_reentrant=False),
    "a part that is a lambda": lambda part, x: _LAMBDA(part.conv(x)),
    "torch's random numbers": lambda _, x: x + torch.randn_like(x) * torch.rand(1),
    "a buffer that is written to": _mean_kept,
    "sizes": lambda _, x: x / x.shape[0] * x.size(1) ** 0.5,
    "a check": lambda _, x: x if isinstance(x, torch.Tensor) and len(x.shape) == 4 else x / 0,
    "no gradients": lambda _, x: x + (x.sign() - x).detach(),
    "other numbers": lambda _, x: x.float().double().relu().to(x.dtype),
    "a write to a part": lambda _, x: _with_first_doubled(x),
}


def _with_first_doubled(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 0] *= 2
    return y


@pytest.mark.parametrize("body", CAPTURED.values(), ids=CAPTURED)
def test_what_a_capture_can_tell_is_told(body: Callable[[_Part, torch.Tensor], Any]) -> None:
    part = _Part(body)
    part.conv.register_forward_hook(lambda *_: None)
    assert _graph(part).opaque == ()


def test_weights_that_are_computed_are_captured_and_their_convolution_split() -> None:
    def part(change: Callable[[nn.Module], Any]) -> nn.Module:
        convolution = nn.Conv2d(4, 4, 3, padding=1)
        change(convolution)
        return convolution

    for change in (
        parametrizations.weight_norm,
        lambda one: prune.l1_unstructured(one, "weight", 0.5),
    ):
        graph = _graph(part(change))
        assert graph.opaque == ()
        assert [one.effect.value for one in graph.convolutions] == ["kernel"] * 3
    # One that is computed from buffers that are written to stays on one device, but is captured.
    assert _graph(part(parametrizations.spectral_norm)).opaque == ()


@dataclass
class _Outputs:
    features: torch.Tensor
    classes: torch.Tensor
    count: int = 3


class _Several(nn.Module):
    def __init__(self, made: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.made, self.conv = made, nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor, *, scale: float = 2.0, **_: Any) -> Any:
        y = self.conv(x) * scale
        return self.made(y, y.mean((2, 3)))


@pytest.mark.parametrize(
    "made", [lambda a, b: (a, [b]), lambda a, b: {"a": a, "b": b}, lambda a, b: _Outputs(a, b, 4)],
    ids=["a tuple", "a dictionary", "a dataclass"],
)  # fmt: skip
def test_several_outputs_keep_their_structure(made: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
    graph = trace(_Several(made), torch.randn(2, 3, 8, 8))
    assert graph.opaque == ()
    assert type(graph.returned) is type(made(torch.zeros(1), torch.zeros(1)))
    assert graph.outputs == ("mul", "mean")


def test_several_inputs_are_taken_by_place_or_by_name() -> None:
    class _Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.dense = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

        def forward(self, image: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
            return self.conv(image).mean((2, 3)) + self.dense(facts)

    images, facts = torch.randn(3, 3, 8, 8), torch.randn(3, 5)
    assert trace(_Two(), (images, facts)).inputs == (0, 1)
    graph = trace(_Two(), {"image": images, "facts": facts})
    assert graph.inputs == ("image", "facts")
    assert graph.opaque == ()
    assert len(graph.further_inputs) == 1


def test_a_model_of_which_nothing_can_be_captured_is_one_operation() -> None:
    graph = trace(_Several(lambda a, b: a if float(b.sum()) < 1e9 else b), torch.randn(2, 3, 8, 8))
    assert [one.name for one in graph.operations] == ["model"]
    assert [one.name for one in graph.opaque] == [""]
    assert graph.convolution_flops > 0


@pytest.mark.parametrize(
    "body",
    [
        lambda _, x: x if len(x) < 100 else x * 2,
        lambda _, x: x if len(x) > 1 else x * 2,
        lambda _, x: x if len(x) % 2 else x * 2,
    ],
    ids=["fewer than a hundred", "more than one", "even"],
)
def test_what_goes_by_the_number_of_images_stays_whole(body: Callable[[_Part, torch.Tensor], Any]) -> None:
    assert len(_graph(_Part(body)).opaque) == 1


def test_the_true_share_counts_convolutions_of_opaque_parts() -> None:
    graph = _graph(_Part(lambda part, x: _Reversed.apply(part.conv(x))))
    inside = graph.convolution_flops - sum(one.flops_per_image for one in graph.convolutions)
    assert inside == 2 * 4 * 4 * 9 * 6 * 6
