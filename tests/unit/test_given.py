"""A model made ready before it is traced: compiled, lazy, in half precision; and its parameter groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.compiled import without_compiler
from pipeline.errors import InputError
from pipeline.run.given import slow_numbers, slowdown, with_all_weights
from pipeline.run.groups import check_loss, grouped, named_groups


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))


def test_a_compiled_model_is_the_one_inside() -> None:
    model = plain()
    assert without_compiler(model) is model
    assert without_compiler(torch.compile(model, backend="eager")) is model  # type: ignore[arg-type]


def test_compiled_parts_are_taken_out_of_a_copy() -> None:
    model = plain()
    names, shared = list(model.state_dict()), torch.compile(model[1], backend="eager")
    model[1] = shared  # type: ignore[assignment]
    model.append(shared)  # type: ignore[arg-type]
    found = without_compiler(model)
    assert list(found.state_dict())[: len(names)] == names
    assert found[1] is found[2]  # type: ignore[index]
    assert model[1] is shared
    x = torch.ones(2, 3, 5, 5)
    torch.testing.assert_close(found.eval()(x), plain_of(model)(x))


def plain_of(model: nn.Sequential) -> nn.Module:
    inner = model[1]._orig_mod
    return nn.Sequential(model[0], inner, inner).eval()  # type: ignore[arg-type]


def lazy() -> nn.Sequential:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Dropout(), nn.Flatten(), nn.LazyLinear(2))


def test_lazy_layers_get_the_weights_of_a_plain_loop_and_no_statistics_move() -> None:
    model = lazy()
    model[2].eval()
    reference, x = lazy(), torch.ones(2, 3, 5, 5)
    torch.manual_seed(7)
    reference.eval()(x)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    ready = with_all_weights(model, x, 7)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(ready.state_dict()[name], tensor), name
    assert ready[1].training  # type: ignore[index]
    assert not ready[2].training  # type: ignore[index]
    assert isinstance(model[0], nn.LazyConv2d)
    usual = plain()
    assert with_all_weights(usual, x, 7) is usual


def test_lazy_layers_that_the_images_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="the lazy layers of the model do not take the first images"):
        with_all_weights(nn.Sequential(nn.LazyConv2d(4, 9)), torch.ones(2, 3, 5, 5), 0)


def test_slow_numbers_are_told_with_the_factor_and_others_are_not() -> None:
    assert slow_numbers("cpu", torch.bfloat16, 1.2) is None
    said = slow_numbers("cpu", torch.bfloat16, 74.6)
    assert said is not None
    assert "computes in bfloat16, and a small convolution on cpu takes 75 times as long" in said
    assert slowdown(torch.float16) > 0


class Head(nn.Module):
    """A loss with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(2, 2)
        self.other = nn.Linear(2, 2)
        self.other.weight = self.one.weight


def test_groups_travel_as_names_and_are_looked_up_by_them() -> None:
    model, loss = Tied(), Head()
    groups = named_groups(
        lambda m: [
            {"params": [m.one.weight], "lr": 0.1},
            {"params": (one for one in (m.one.bias, loss.centres))},
            {"params": m.other.bias},
        ],
        model,
        loss,
    )
    assert groups is not None
    assert [one.model for one in groups] == [("one.weight", "other.weight"), ("one.bias",), ("other.bias",)]
    assert [one.loss for one in groups] == [(), ("centres",), ()]
    home: dict[str, torch.Tensor] = {"other.weight": torch.ones(1), "one.bias": torch.ones(2)}
    found = grouped(groups, list(home.values()), home, {})
    assert found[0]["lr"] == 0.1
    assert found[0]["params"][0] is home["other.weight"]
    assert [len(one["params"]) for one in found] == [1, 1, 0]
    assert len(grouped(groups, [], {}, {"centres": loss.centres})[1]["params"]) == 1


@pytest.mark.parametrize("named", [False, True])
def test_parameters_in_no_group_are_one_group(named: bool) -> None:
    groups = named_groups(lambda m: m.named_parameters() if named else m.parameters(), nn.Linear(2, 2), None)
    assert groups is not None
    assert [(one.model, dict(one.options)) for one in groups] == [(("weight", "bias"), {})]


@pytest.mark.parametrize(
    ("select", "sentence"),
    [
        (lambda _: [{"params": [torch.zeros(4, 8)]}], r"a tensor of shape \(4, 8\) that the model lacks"),
        (lambda _: [{"weights": []}], "parameter_groups gives no parameter groups"),
        (lambda m: m.nothing, "parameter_groups gives no parameter groups: .*nothing"),
        (lambda m: [{"params": [m.bias]}, m.weight], "tensors beside groups"),
    ],
)
def test_groups_of_something_else_are_refused(select: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        named_groups(select, nn.Linear(2, 2), None)


def test_a_loss_that_shares_a_weight_with_the_model_is_refused() -> None:
    model, loss = nn.Linear(2, 2), Head()
    check_loss(model, loss)
    loss.centres = model.weight
    with pytest.raises(InputError, match="the loss has the model's 'weight' as its own 'centres'"):
        check_loss(model, loss)
