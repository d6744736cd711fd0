"""What a trace makes of a model: no writes, no state, effects, ties; without any cluster."""

from __future__ import annotations

import copy
import io
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.graph.effects import Effect
from pipeline.graph.trace import Graph, trace
from pipeline.plan.strategies import plan_network
from pipeline.plan.ties import bound, on_master, ties

IMAGES = (4, 6, 6)


class _Model(nn.Module):
    """Some modules, and the test's own ``forward``."""

    def __init__(self, body: Callable[[_Model, torch.Tensor], object]) -> None:
        super().__init__()
        self.body = body
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.batch_norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> object:
        return self.body(self, x)


def _effects(model: nn.Module, shape: tuple[int, ...] = IMAGES) -> dict[str, Effect]:
    return {one.name: one.effect for one in _graph(model, shape).operations}


def _graph(model: nn.Module, shape: tuple[int, ...] = IMAGES) -> Graph:
    return trace(model, torch.ones(2, *shape))


def _read_after_relu(model: _Model, x: torch.Tensor) -> object:
    y = model.conv(x)
    return model.other(model.relu(y)) + y


def _read_after_method(model: _Model, x: torch.Tensor) -> object:
    y = model.conv(x)
    y.mul_(2).clamp_(-1, 1)
    return model.other(y) + y


def _add_to_another_name(model: _Model, x: torch.Tensor) -> object:
    y = model.conv(x)
    kept = y
    y += 1
    return kept + model.other(y)


def _set_items(model: _Model, x: torch.Tensor) -> object:
    y = model.conv(x)
    y[:, 0] = 0
    y[:, 1:3] += 1
    return y


def _count_in_place(model: _Model, x: torch.Tensor) -> object:
    count = x.shape[0]
    more = count
    more += 1
    return model.conv(x) * more / count


def _in_place_by_position(model: _Model, x: torch.Tensor) -> object:
    y = model.conv(x)
    F.leaky_relu(y, 0.1, True)
    return y


def _view_then_in_place(model: _Model, x: torch.Tensor) -> object:
    y = model.conv(x).view(x.size(0), -1)
    return F.relu(y, inplace=True) + y


def _write_through_view(model: _Model, x: torch.Tensor) -> object:
    y = model.conv(x)
    part = y[:, :2]
    part += 1
    return model.other(y)


def _read_view_of_written(model: _Model, x: torch.Tensor) -> object:
    y = model.conv(x)
    flat = torch.flatten(y, 1)
    model.relu(y)
    return flat.view(-1, 4, 6, 6)


def _write_to_buffer(model: _Model, x: torch.Tensor) -> object:
    model.seen += 1
    return model.conv(x) * model.seen


WRITES = [
    _read_after_relu, _read_after_method, _add_to_another_name, _set_items, _count_in_place, _in_place_by_position,
    _view_then_in_place, _write_through_view, _read_view_of_written, _write_to_buffer,
]  # fmt: skip


@pytest.mark.parametrize("body", WRITES)
def test_what_is_read_after_a_write_reads_what_was_written(body: Callable[[_Model, torch.Tensor], object]) -> None:
    assert _graph(_Model(body)).opaque == ()  # and so its calls were compared with the model itself


def _count_calls(model: _Model, x: torch.Tensor) -> object:
    model.calls += 1
    return model.conv(x) * model.calls


def _write_under_no_grad(model: _Model, x: torch.Tensor) -> object:
    y = model.conv(x)
    with torch.no_grad():
        y.mul_(2)
    return y


def _branch_on_data(model: _Model, x: torch.Tensor) -> object:
    return model.conv(x) if x.sum() > 0 else model.other(x)


@pytest.mark.parametrize("body", [_count_calls, _write_under_no_grad, _branch_on_data])
def test_what_a_capture_would_lose_stays_whole(body: Callable[[_Model, torch.Tensor], object]) -> None:
    model = _Model(body)
    assert _effects(model) == {"model": Effect.WHOLE}
    graph = _graph(nn.Sequential(nn.Conv2d(4, 4, 1), model, nn.Conv2d(4, 4, 1)))
    assert [one.name for one in graph.opaque] == ["1"]
    effects = {one.name: one.effect for one in graph.operations}
    assert (effects["_0"], effects["_1"], effects["_2"]) == (Effect.KERNEL, Effect.WHOLE, Effect.KERNEL)


@pytest.mark.parametrize("body", [_write_to_buffer, _count_calls, _read_after_relu])
def test_tracing_leaves_a_model_as_it_was(body: Callable[[_Model, torch.Tensor], object]) -> None:
    model = _Model(body).eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    _graph(model)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert model.calls == 0
    assert not model.training
    assert model.relu.inplace
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_model_keeps_to_look_at_does_not_keep_it_whole() -> None:
    def body(model: _Model, x: torch.Tensor) -> object:
        model.features = model.conv(x)
        return model.features

    model = _Model(body)
    assert _effects(model) == {"conv": Effect.KERNEL}
    assert not hasattr(model, "features")


def test_optional_arguments_take_their_defaults() -> None:
    class _Optional(_Model):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, features: bool = False) -> object:
            y = self.conv(x)
            if mask is not None:
                y = y * mask
            return y if features else self.other(y)

    assert list(_effects(_Optional(_branch_on_data))) == ["conv", "other"]


def test_a_weight_that_is_used_in_two_places_has_one_split() -> None:
    tied = _Model(lambda model, x: model.other(model.conv(x)))
    tied.other.weight = tied.conv.weight
    graph = _graph(tied)
    assert {one.name for one in ties(graph)["conv"].operations} == {"conv", "other"}
    plan = plan_network(graph, "kernel", batch_size=4, labels=["cpu"] * 2, shares=(0.5, 0.5))
    assert {plan[one.name].output.kind for one in graph.operations} == {"K"}


def test_a_weight_that_is_needed_in_two_ways_stays_on_the_master() -> None:
    graph = _graph(_Model(lambda model, x: model.conv(x) * model.conv.weight.mean()))
    plan = plan_network(graph, "kernel", batch_size=4, labels=["cpu"] * 2, shares=(0.5, 0.5))
    assert {plan[one.name].output.kind for one in graph.operations} == {"M"}


def test_gradients_flow_where_autograd_would_let_them() -> None:
    def body(model: _Model, x: torch.Tensor) -> object:
        with torch.no_grad():
            y = model.conv(x)
        model.batch_norm(y)
        return model.other(y) * model.scale + model.other(x).detach()

    graph = _graph(_Model(body))
    assert [one.differentiable for one in graph.operations] == [False, False, True, True, False, False, True]
    trained = {p.name for one in graph.operations for p in one.parameters if p.trained}
    assert trained == {"other.weight", "other.bias", "scale"}


def test_flattening_by_any_name_is_seen() -> None:
    for flatten in (
        lambda _, x: torch.flatten(x, 1),
        lambda _, x: x.flatten(1),
        lambda _, x: x.view(x.size(0), -1),
        lambda _, x: x.reshape(x.shape[0], 144),
        lambda _, x: x.view(-1, 4 * 6 * 6),
    ):
        assert list(_effects(_Model(flatten)).values())[-1] is Effect.FLATTEN  # type: ignore[arg-type]
    assert list(_effects(nn.Sequential(nn.Conv2d(4, 2, 1), nn.Flatten())).values()) == [Effect.KERNEL, Effect.FLATTEN]
    assert _effects(_Model(lambda _, x: x.flatten(2))) == {"flatten": Effect.CHANNELWISE}
    folded = _graph(_Model(lambda _, x: x.flatten()))["flatten"]
    assert (folded.effect, folded.shape, folded.per_image) == (Effect.IMAGEWISE, None, 144)


def test_parts_of_a_tensor_go_together_and_whole_pieces_travel() -> None:
    def body(model: _Model, x: torch.Tensor) -> object:
        one, other = model.conv(x).chunk(2, dim=1)
        return torch.cat([other, one], 1) * x[:, :1]

    graph = _graph(_Model(body))
    together = bound(graph)
    assert set(together["chunk"]) == {"chunk", "getitem", "getitem_1"}
    assert graph["chunk"].shape is None
    assert graph["getitem"].shape == (2, 6, 6)
    assert {graph[name].effect for name in ("chunk", "getitem", "cat", "mul")} == {Effect.IMAGEWISE}
    assert on_master(graph) == frozenset()


def test_results_that_cannot_travel_are_returned_from_the_master() -> None:
    graph = _graph(_Model(lambda model, x: (model.conv(x).chunk(2, 1), x.shape[0])))
    assert graph.outputs == ("getitem", "getitem_1")
    folded = _graph(_Model(lambda model, x: model.conv(x).flatten()))
    assert on_master(folded) == {"flatten"}
    for strategy in ("kernel", "batch"):
        plan = plan_network(folded, strategy, batch_size=4, labels=["cpu"] * 2, shares=(0.5, 0.5))  # type: ignore[arg-type]
        assert plan["flatten"].output.kind == "M"


def test_tensors_that_are_added_share_one_split_in_whole_groups() -> None:
    graph = _graph(_Model(lambda model, x: model.norm(model.conv(x)) + torch.tanh(model.other(x))))
    tie = ties(graph)["conv"]
    assert {one.name for one in tie.operations} == {"conv", "norm", "other", "tanh", "add"}
    assert tie.unit == 2
    assert {one.name for one in tie.weighted} == {"conv", "other"}


def test_a_norm_of_all_channels_does_not_keep_its_neighbours_whole() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Conv2d(4, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            z: torch.Tensor = y + F.avg_pool2d(self.norm(y), 1) + self.second(y)
            return z

    graph = _graph(Residual())
    assert ties(graph)["norm"].unit == 8
    assert ties(graph)["first"].unit == 1
    plan = plan_network(graph, "kernel", batch_size=4, labels=["cpu"] * 2, shares=(0.5, 0.5))
    assert plan.split == 1
    assert len(plan["norm"].output.holders) == 1


def test_channels_that_a_norm_mixes_stay_where_they_were() -> None:
    """As in Swin: channels last for a LayerNorm, then back for a convolution."""
    graph = _graph(_Model(lambda model, x: model.conv(F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2))))
    assert [one.channel_axis for one in graph.operations] == [3, 3, 1, 1]
    assert graph["conv"].effect is Effect.KERNEL


def test_an_export_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    trace(_Model(lambda model, x: model.conv(x) * float(torch.rand(()))), torch.rand(2, *IMAGES))
    assert capfd.readouterr() == ("", "")


def test_other_threads_write_on_while_a_model_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar of another thread, which asks again and again whether it draws on a terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, asked = Terminal(), list[bool]()

    def body(model: _Model, x: torch.Tensor) -> object:
        def draw() -> None:
            asked.append(sys.stderr.isatty())
            sys.stderr.write("still there")

        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
        return model.conv(x)

    monkeypatch.setattr(sys, "stderr", terminal)
    trace(_Model(body), torch.rand(2, *IMAGES))
    assert asked
    assert all(asked)
    assert terminal.getvalue() == "still there" * len(asked)


def test_data_of_a_tensor_is_its_values_without_a_gradient() -> None:
    graph = _graph(_Model(lambda model, x: torch.cat([model.conv(x).data, model.other(x)], 1)))
    assert not graph.opaque
    assert {p.name for one in graph.operations for p in one.parameters if p.trained} == {"other.weight", "other.bias"}


@pytest.mark.parametrize(
    ("convolution", "unit", "input_unit"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), 4, 2),
        (nn.Conv2d(4, 4, 3, groups=4), 1, 1),
        (nn.Conv2d(4, 12, 3, groups=4), 3, 1),
        (nn.ConvTranspose2d(4, 4, 3, groups=2), 2, 2),
    ],
)
def test_groups_are_not_parted(convolution: nn.Module, unit: int, input_unit: int) -> None:
    (operation,) = _graph(nn.Sequential(convolution)).operations
    assert (operation.effect, operation.unit, operation.input_unit) == (Effect.GROUPED, unit, input_unit)


def test_channels_are_followed_through_permutations() -> None:
    def body(model: _Model, x: torch.Tensor) -> object:
        y = torch.tanh(model.conv(x).permute(0, 2, 3, 1))
        return (y.transpose(1, 3) * 2).sum(2)

    graph = _graph(_Model(body))
    assert [one.channel_axis for one in graph.operations] == [1, 3, 3, 1, 1, 1]
    assert all(one.effect is Effect.CHANNELWISE for one in graph.operations[1:])


def test_a_batchnorm_that_is_kept_in_evaluation_mode_goes_by_what_it_knows() -> None:
    class _Frozen(_Model):
        def train(self, mode: bool = True) -> _Frozen:
            super().train(mode)
            self.batch_norm.eval()
            return self

    model = _Frozen(lambda model, x: model.batch_norm(model.conv(x)))
    assert _effects(model)["batch_norm"] is Effect.CHANNELWISE
    kept = _Model(lambda model, x: model.batch_norm(model.conv(x)))
    kept.batch_norm.eval()
    assert _effects(kept)["batch_norm"] is Effect.CHANNELWISE


def test_masks_are_drawn_in_the_order_of_memory() -> None:
    graph = _graph(_Model(lambda model, x: F.dropout(model.conv(x).permute(0, 2, 3, 1), 0.5)))
    noise = graph["dropout"].noise
    assert noise is not None
    assert noise.order == (0, 3, 1, 2)


def test_masks_that_nobody_uses_are_drawn_all_the_same() -> None:
    def body(model: _Model, x: torch.Tensor) -> object:
        F.dropout(x, 0.5)
        torch.tanh(x)
        return model.conv(x)

    assert list(_effects(_Model(body))) == ["dropout", "conv"]
