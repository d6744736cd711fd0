"""The order of numbers in memory changes nothing but the strides."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.run.memory_format import arrange, arranged, empty, flat, in_memory_order, shaped_as


def test_numbers_keep_their_places_in_either_order() -> None:
    x_BCHW = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    for last in (False, True):
        there = arranged(x_BCHW, channels_last=last)
        assert torch.equal(there, x_BCHW)
        assert in_memory_order(there, channels_last=last).is_contiguous()
        numbers = flat(there, channels_last=last)
        assert numbers.data_ptr() == there.data_ptr()
        assert torch.equal(shaped_as(numbers, there, channels_last=last), x_BCHW)
        made = empty(x_BCHW.shape, channels_last=last, dtype=x_BCHW.dtype, device="cpu")
        assert made.stride() == there.stride()
    matrix = torch.ones(4, 5)
    assert arranged(matrix, channels_last=True) is matrix
    assert flat(matrix, channels_last=True).shape == (20,)


def test_a_module_goes_to_and_fro_with_its_parameters_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    weight, before = model[0].weight, model[0].weight.detach().clone()
    arrange(model.parameters(), channels_last=True)
    assert weight is model[0].weight
    assert not weight.is_contiguous()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    arrange(model.parameters(), channels_last=False)
    assert weight.is_contiguous()
    assert torch.equal(weight, before)


def test_a_depthwise_weight_has_the_strides_of_its_order() -> None:
    """Both orders are the same numbers in memory, but torch's fast kernels go by the strides."""
    layer = nn.Conv2d(8, 8, 5, padding=2, groups=8)
    before = layer.weight.detach().clone()
    for last, strides in ((True, (25, 1, 5, 1)), (False, (25, 25, 5, 1))):
        arrange(layer.parameters(), channels_last=last)
        assert layer.weight.stride() == strides
        assert torch.equal(layer.weight, before)
