"""Segments that do the same work are found, and those that do not are told apart."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pipeline.calibration.measure import FRACTIONS, calibration_images
from pipeline.calibration.segments import chains_of, geometry
from pipeline.calibration.worker import Task, split_plan
from pipeline.graph.trace import trace
from pipeline.networks import network


def _works(model: nn.Module) -> list[tuple[str, str]]:
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    plan = split_plan(graph, 0.5)
    return [(chain.name, geometry(graph, plan, chain)) for chain in chains_of(graph)]


def _stack(*strides: int) -> nn.Sequential:
    first = nn.Conv2d(3, 8, 3, padding=1)
    return nn.Sequential(first, *(nn.Conv2d(8, 8, 3, stride=stride, padding=1) for stride in strides))


def test_a_network_is_calibrated_by_convolution_and_what_lies_between() -> None:
    graph = trace(network("6:10"), torch.empty(2, 3, 32, 32))
    chains = chains_of(graph)
    assert [chain.name for chain in chains] == ["conv1", "relu1+pool1", "conv2", "relu2+pool2+flatten", "dense"]
    assert all(chain.splittable for chain in chains)
    assert [chain.outputs for chain in chains] == [("conv1",), ("pool1",), ("conv2",), ("flatten",), ("dense",)]


def test_layers_of_one_shape_are_alike_whatever_their_names() -> None:
    works = [work for _, work in _works(_stack(1, 1, 2))]
    assert works[1] == works[2]
    assert len(set(works)) == 3


def test_a_layer_whose_input_needs_no_gradient_is_not_like_one_whose_does() -> None:
    works = [work for _, work in _works(nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))))]
    assert works[0] != works[1]


def test_the_blocks_of_a_resnet_are_alike() -> None:
    works = _works(network("resnet18"))
    assert len({work for _, work in works}) < 0.75 * len(works)
    named = dict(works)
    assert named["layer1_0_conv1"] == named["layer1_1_conv2"] != named["layer2_0_conv1"]


def test_a_narrow_layer_is_measured_at_no_number_of_kernels_twice_nor_at_none() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 16, 3)), torch.zeros(2, 3, 9, 9))
    task = Task(
        model=None, modules={}, graph=graph, cuts=frozenset(), chains=tuple(chains_of(graph)), weights=(1, 1, 1),
        images=(1, 4), fractions=FRACTIONS, repetitions=1, passes=0, alone=(),
    )  # fmt: skip
    narrow, _, wide = task.kernels()
    assert narrow[np.isfinite(narrow)].tolist() == [1, 2, 4]
    assert wide[np.isfinite(wide)].tolist() == [1, 2, 4, 8, 16]


def test_more_work_per_image_is_measured_with_fewer_images() -> None:
    few, many = (
        calibration_images(trace(network(name), torch.zeros(2, 3, 32, 32)), 64) for name in ("500:1500", "50:500")
    )
    assert many == (16, 64)
    assert 4 <= few[-1] < 64
    assert few[0] < few[-1]
    assert calibration_images(trace(network("50:500"), torch.zeros(2, 3, 32, 32)), 1) == (1,)


def test_the_same_layers_in_numbers_of_another_type_are_other_work() -> None:
    def works(dtype: torch.dtype) -> list[str]:
        graph = trace(_stack(1).to(dtype), torch.zeros(2, 3, 32, 32))
        return [geometry(graph, split_plan(graph, 0.5), chain) for chain in chains_of(graph)]

    assert works(torch.float32) == works(torch.float32)
    assert not set(works(torch.float32)) & set(works(torch.float64))


class _Repeated(nn.Module):
    """Cannot be traced, and does more or less of the same."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.repeats, self.convolution = repeats, nn.Conv2d(8, 8, 3, padding=1)

    def extra_repr(self) -> str:
        return f"repeats={self.repeats}"

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        for _ in range(self.repeats if x_BCHW.sum() > 0 else 1):
            x_BCHW = self.convolution(x_BCHW)
        return x_BCHW


def test_modules_whose_text_tells_them_apart_are_not_alike() -> None:
    few, many = (nn.Sequential(nn.Conv2d(3, 8, 3), _Repeated(repeats), nn.Flatten()) for repeats in (3, 5))
    apart = [one != other for one, other in zip(_works(few), _works(many), strict=True)]
    assert sum(apart) == 1
