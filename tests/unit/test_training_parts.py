"""Parts of a training that need no cluster: split BatchNorm, the check of a recipe, what parity calls exact."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from pipeline.errors import InputError
from pipeline.parity import Parity
from pipeline.run import batch_norm
from pipeline.run.recipe import CrossEntropy, Recipe, check_recipe

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(("mean", "spread"), [(0, 1), (20, 0.01), (5, 0.01), (30_000, 10)])
def test_split_batchnorm_keeps_the_digits_that_torch_keeps(mean: float, spread: float) -> None:
    torch.manual_seed(0)
    x_BCHW = torch.randn(10, 7, 6, 6) * spread + mean
    split, single, reference = nn.BatchNorm2d(7), nn.BatchNorm2d(7), nn.BatchNorm2d(7).double()
    parts = x_BCHW[:6], x_BCHW[6:]
    moments_RC = sum(batch_norm.moments(part, rank, 2)[1] for rank, part in enumerate(parts))
    assert isinstance(moments_RC, torch.Tensor)
    found = torch.cat(
        [batch_norm.normalise(part, moments_RC, (6, 4), split.weight, split.bias, split.eps) for part in parts]
    )
    assert split.running_mean is not None
    assert split.running_var is not None
    batch_norm.track(split.running_mean, split.running_var, 0.1, moments_RC, (6, 4), 36)
    expected, usual = reference(x_BCHW.double()), single(x_BCHW)
    assert (found - expected).abs().max() < 10 * (usual - expected).abs().max()
    assert torch.allclose(split.running_var.double(), reference.running_var, rtol=1e-4)  # type: ignore[arg-type]
    assert torch.allclose(split.running_mean.double(), reference.running_mean, rtol=1e-5)  # type: ignore[arg-type]


def test_split_batchnorm_of_constant_channels_is_finite() -> None:
    x_BCHW = torch.linspace(0.1, 400, 300).view(1, 300, 1, 1).expand(8, 300, 4, 4).contiguous()
    moments_RC = batch_norm.moments(x_BCHW[:5], 0, 2)[1] + batch_norm.moments(x_BCHW[5:], 1, 2)[1]
    assert batch_norm.normalise(x_BCHW, moments_RC, (5, 3), None, None, 1e-5).isfinite().all()


@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_statistics_of_large_planes_are_exact_with_the_channels_last(mean: float) -> None:
    """Where torch's own, in float32, are off by 3e-5 and more."""
    torch.manual_seed(0)
    x_BCHW = (torch.randn(4, 8, 128, 128) + mean).to(memory_format=torch.channels_last).requires_grad_()
    weight_C, bias_C = torch.rand(8).requires_grad_(), torch.rand(8).requires_grad_()
    given, affine = x_BCHW.detach().double().requires_grad_(), [weight_C.detach().double(), bias_C.detach().double()]
    expected = nn.functional.batch_norm(given, None, None, *affine, training=True)
    found, moments_RC = batch_norm.of_all(x_BCHW, weight_C, bias_C, 1e-5)
    variance_C = given.detach().var((0, 2, 3), correction=0)
    assert ((moments_RC[1] - variance_C) / variance_C).abs().max() < 1e-6
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
    gradient = torch.randn(4, 8, 128, 128)
    found.backward(gradient)
    expected.backward(gradient.double())
    assert x_BCHW.grad is not None
    assert given.grad is not None
    assert torch.allclose(x_BCHW.grad.double(), given.grad, rtol=1e-3, atol=1e-4)


class _Clipping(torch.optim.SGD):
    """Looks at all parameters together."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([one for group in self.param_groups for one in group["params"]], 0.1)
        return super().step(closure)


class _Normalising(torch.optim.SGD):
    """Looks at one whole weight."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for one in group["params"]:
                    one.div_(one.norm())
        return result


@pytest.mark.parametrize("optimizer", [_Clipping, _Normalising, torch.optim.LBFGS])
def test_an_optimiser_that_mixes_elements_is_refused(optimizer: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(InputError, match="the optimiser"):
        check_recipe(Recipe(loss=nn.CrossEntropyLoss(), optimizer=functools.partial(optimizer, lr=0.1)))


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop"]
)
def test_an_optimiser_by_element_is_taken(name: str) -> None:
    check_recipe(Recipe(loss=nn.CrossEntropyLoss(), optimizer=functools.partial(getattr(torch.optim, name), lr=0.01)))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"clip_norm": 0.0}, "clip_norm 0.0"),
        ({"clip_value": -1.0}, "clip_value -1.0"),
        ({"accumulate": 0}, "accumulate 0"),
        ({"scheduled_by": "batch"}, "scheduled_by 'batch'"),
        ({"scheduler": functools.partial(ReduceLROnPlateau, factor=0.5), "scheduled_by": "step"}, "ReduceLROnPlateau"),
        ({"scheduler": functools.partial(ReduceLROnPlateau, mode="max")}, "mode='max' would follow the training loss"),
        ({"scheduler": lambda one: ReduceLROnPlateau(one, mode="max"), "monitor": "loss"}, "mode='max' would follow"),
        ({"scheduler": functools.partial(StepLR, size=3)}, "the scheduler cannot be used: .*'size'"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        check_recipe(Recipe(loss=nn.CrossEntropyLoss(), optimizer=SGD, **wrong))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_cross_entropy_takes_class_indices_of_any_whole_numbers(dtype: torch.dtype) -> None:
    output, target = torch.randn(3, 4), torch.tensor([1, 3, 0])
    expected = nn.functional.cross_entropy(output, target)
    assert CrossEntropy()(output, target.to(dtype)) == expected
    soft = nn.functional.one_hot(target, 4).float()
    torch.testing.assert_close(CrossEntropy()(output, soft), expected)


@pytest.mark.parametrize(("weights", "exact"), [(1e-12, True), (1e-6, False), (math.nan, False), (math.inf, False)])
def test_parity_does_not_call_nan_exact(weights: float, exact: bool) -> None:
    found = Parity(
        strategy="kernel", shares=(0.5, 0.5), loss=0.0, gradients=0.0, weights=weights, statistics=0.0, split=1.0,
        opaque=(), seconds=1.0,
    )  # fmt: skip
    assert found.is_exact == exact
