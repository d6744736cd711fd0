"""What tells one network from another of the same names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.calibration.segments import chains_of, geometry
from pipeline.calibration.worker import split_plan
from pipeline.graph.effects import Effect
from pipeline.graph.trace import Graph, trace
from pipeline.networks import network

IMAGES_BCHW = torch.zeros(2, 3, 8, 8)


class Small(nn.Module):
    """Layers of which the arguments differ and the names do not."""

    def __init__(
        self,
        *,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        pool: type[nn.Module] = nn.MaxPool2d,
        dense: int = 7,
        classes: int = 10,
        dropped: float = 0.5,
        added: float = 1.5,
        axis: int = 2,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.conv1 = nn.Conv2d(
            3, 6, kernel, padding=padding, stride=stride, dilation=dilation, groups=groups, bias=bias
        )
        self.pool = pool(2)
        self.dense = nn.Linear(6 * 4 // stride, dense)
        self.drop, self.head = nn.Dropout(dropped), nn.Linear(dense, classes)
        self.added, self.axis = added, axis

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCW = self.pool(self.conv1(x_BCHW)).mean(self.axis) + self.added
        logits: torch.Tensor = self.head(self.drop(self.dense(torch.flatten(x_BCW, 1))))
        return logits


class Unknown(nn.Module):
    """Cannot be traced, and shows what its weights are and where a function of its own lies in memory."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], *, dilation: int = 1) -> None:
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(3, 3, 3, padding=dilation, dilation=dilation)

    def extra_repr(self) -> str:
        return f"{self.conv.weight.mean().item():e} {list(self.conv.weight[0, 0, 0])} {self.function}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.conv(x)) if x.sum() > 0 else self.conv(x)


def _small(**changed: object) -> Graph:
    return trace(Small(**changed), IMAGES_BCHW)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [
        {"kernel": 5}, {"stride": 2}, {"dilation": 2}, {"groups": 3}, {"bias": False}, {"pool": nn.AvgPool2d},
        {"dense": 8}, {"classes": 11}, {"axis": 3},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_another_argument_or_size_is_another_network(changed: dict[str, object]) -> None:
    other = _small(**changed)
    assert [one.name for one in other.operations] == [one.name for one in _small().operations]
    assert other.digest != _small().digest


def test_other_images_or_frozen_weights_are_another_network() -> None:
    shape = torch.zeros(2, 3, 32, 32)
    assert trace(network("6:10"), shape).digest != trace(network("6:10", image_shape=(1, 32, 32)), shape[:, :1]).digest
    frozen = Small()
    frozen.conv1.requires_grad_(False)
    assert trace(frozen, IMAGES_BCHW).digest != _small().digest


def test_a_plan_is_for_the_network_whichever_weights_are_trained() -> None:
    frozen = Small()
    frozen.conv1.requires_grad_(False)
    assert trace(frozen, IMAGES_BCHW).plan_digest == _small().plan_digest != _small(kernel=5).plan_digest


def test_values_rates_and_slopes_do_not_count() -> None:
    torch.manual_seed(1)
    assert _small(dropped=0.2, added=1e-7).digest == _small().digest
    assert _small(added=-0.25).digest == _small(added=-1e-7).digest == _small().digest
    assert trace(Small().double().eval(), torch.ones(5, 3, 8, 8)).digest == _small().digest


def test_what_a_module_of_ones_own_shows_does_not_count_but_the_layers_within_do() -> None:
    models = [nn.Sequential(Unknown(lambda x: x, dilation=dilation)) for dilation in (1, 1, 2)]
    assert str(models[0]) != str(models[1])
    one, same, other = (trace(model, IMAGES_BCHW) for model in models)
    assert {each.effect for each in one.operations} == {Effect.WHOLE}
    assert one.operations[0].call == same.operations[0].call
    assert one.digest == same.digest != other.digest


def test_it_is_the_same_in_another_process_and_so_is_what_calibrations_are_kept_by() -> None:
    program = (
        "import torch; from pipeline.graph.trace import trace; from pipeline.networks import network;"
        "from pipeline.calibration.segments import chains_of, geometry;"
        "from pipeline.calibration.worker import split_plan;"
        "model = network('6:10'); graph = trace(model, torch.zeros(1, 3, 32, 32)); plan = split_plan(graph, 0.5);"
        "print(graph.digest, *(geometry(graph, plan, chain) for chain in chains_of(graph)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    model = network("6:10")
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    plan = split_plan(graph, 0.5)
    works = [geometry(graph, plan, chain) for chain in chains_of(graph)]
    assert done.stdout.split() == " ".join([graph.digest, *works]).split()
