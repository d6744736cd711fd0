"""Plans compile to the instructions one would write down by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.graph.effects import Effect
from pipeline.graph.trace import trace
from pipeline.networks import network
from pipeline.plan.plan import Strategy, parameters_of
from pipeline.plan.program import Compute, Exchange, Program, compile_program
from pipeline.plan.strategies import plan_network

BATCH = 4


def _program(strategy: Strategy, shares: tuple[float, ...]) -> Program:
    graph = trace(network("6:10"), torch.empty(2, 3, 32, 32))
    labels = ["cpu"] * len(shares)
    plan = plan_network(graph, strategy, batch_size=BATCH, labels=labels, shares=shares)
    return compile_program(graph, plan, BATCH)


def _words(program: Program) -> list[str]:
    return [
        f"{one.direction} {one.name}" if isinstance(one, Compute | Exchange) else one.name
        for one in program.instructions
    ]


def test_kernel_split_keeps_weights_on_the_shards() -> None:
    program = _program("kernel", (0.5, 0.5))
    assert _words(program) == [
        "forward images M→R",
        "forward conv1+relu1+pool1",
        "forward pool1 K→R",
        "forward conv2",
        "forward relu2+pool2+flatten+dense",
        "forward dense P→M",
        "forward loss",
        "backward loss",
        "backward dense P→M",
        "backward relu2+pool2+flatten+dense",
        "backward conv2 input gradient",
        "backward pool1 K→R",
        "backward conv2 weight gradient",
        "backward conv1+relu1+pool1",
        "update",
    ]
    assert program.update.ranks == (0, 1)


def test_a_program_can_be_cut_where_nothing_has_to_travel() -> None:
    graph = trace(network("6:10"), torch.empty(2, 3, 32, 32))
    plan = plan_network(graph, "kernel", batch_size=BATCH, labels=["cpu"] * 2, shares=(0.5, 0.5))
    whole = _words(_program("kernel", (0.5, 0.5)))
    cut = _words(compile_program(graph, plan, BATCH, cuts=frozenset({"conv1", "relu1", "conv2", "relu2", "dense"})))
    assert cut[1:3] == ["forward conv1", "forward relu1+pool1"]
    assert cut[-3:] == ["backward relu1+pool1", "backward conv1", "update"]
    assert [one for one in cut if "→" in one] == [one for one in whole if "→" in one]


def test_paper_sends_input_and_kernels_and_gathers_feature_maps() -> None:
    program = _program("paper", (0.5, 0.5))
    words = _words(program)[1:]
    assert words[:6] == [
        "forward conv1.weight M→K",
        "forward conv1.bias M→K",
        "forward conv1",
        "forward conv1 K→M",
        "forward relu1+pool1",
        "forward pool1 M→R",
    ]
    assert words[-5:] == [
        "backward conv1 K→M",
        "backward conv1",
        "backward conv1.bias M→K",
        "backward conv1.weight M→K",
        "update",
    ]
    assert program.update.ranks == (0,)


def test_nothing_travels_backward_for_the_images_themselves() -> None:
    for strategy in ("kernel", "paper"):
        program = _program(strategy, (0.5, 0.5))  # type: ignore[arg-type]
        moved = [one.source.name for one in program.backward if isinstance(one, Exchange)]
        assert program.forward[0].source.name not in moved  # type: ignore[union-attr]


def test_a_rank_without_kernels_takes_no_part() -> None:
    program = _program("kernel", (1.0, 0.0))
    assert all(one.ranks == (0,) for one in program.instructions if not isinstance(one, Exchange) or one.elements)


def test_gathering_bytes_are_counted_once_per_link() -> None:
    program = _program("kernel", (0.5, 0.5))
    gather = next(one for one in program.forward if one.name == "pool1 K→R")
    assert isinstance(gather, Exchange)
    assert gather.elements == BATCH * 6 * 14 * 14  # each of two ranks sends its half to the other


def test_frozen_layers_get_no_gradient_instructions() -> None:
    model = network("6:10")
    for parameter in model.conv1.parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    graph = trace(model, torch.empty(2, 3, 32, 32))
    plan = plan_network(graph, "paper", batch_size=BATCH, labels=["cpu"] * 2, shares=(0.5, 0.5))
    program = compile_program(graph, plan, BATCH)
    assert not any("conv1" in one.name for one in program.backward)


class _Strange(nn.Module):
    """Control flow that depends on the data: it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return (y if y.sum() > 0 else -y).mean(dim=(2, 3))


def test_a_model_that_cannot_be_traced_stays_whole_on_the_master() -> None:
    graph = trace(_Strange(), torch.zeros(2, 3, 8, 8))
    assert [operation.effect for operation in graph.operations] == [Effect.WHOLE]
    assert len(graph.operations[0].parameters) == 2


def test_shapes_of_odd_convolutions_are_known() -> None:
    model = nn.Sequential(nn.Conv2d(2, 5, 3, stride=2, padding=4, dilation=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    graph = trace(model, torch.empty(2, 2, 17, 13))
    with torch.no_grad():
        expected = tuple(model(torch.zeros(1, 2, 17, 13)).shape[1:])
    assert graph.operations[-1].shape == expected
    assert [operation.effect for operation in graph.operations] == [
        Effect.KERNEL,
        Effect.CHANNELWISE,
        Effect.CHANNELWISE,
    ]


def test_images_of_the_wrong_shape_are_named() -> None:
    with pytest.raises(InputError, match=r"shape \(1, 28, 28\)"):
        trace(network("6:10"), torch.empty(2, 1, 28, 28))


def test_every_parameter_has_one_home() -> None:
    graph = trace(network("6:10"), torch.empty(2, 3, 32, 32))
    plan = plan_network(graph, "kernel", batch_size=BATCH, labels=["cpu"] * 3, shares=(0.2, 0.3, 0.5))
    names = [one.parameter.name for _, one in parameters_of(graph, plan)]
    assert names == [name for name, _ in network("6:10").named_parameters()]


@pytest.mark.parametrize(
    ("shares", "message"),
    [((0.5, 0.4), "must add up to 1"), ((0.5, 0.3, 0.2), "3 devices, but there are 2"), ((3, 4), "must add up")],
    ids=["fractions", "too many", "kernels"],
)
def test_shares_that_do_not_fit_are_refused(shares: tuple[float, ...], message: str) -> None:
    graph = trace(network("6:10"), torch.empty(2, 3, 32, 32))
    with pytest.raises(InputError, match=message):
        plan_network(graph, "kernel", batch_size=BATCH, labels=["cpu"] * 2, shares=shares)


def test_an_unknown_strategy_is_named() -> None:
    graph = trace(network("6:10"), torch.empty(2, 3, 32, 32))
    with pytest.raises(InputError, match="'magic' is unknown"):
        plan_network(graph, "magic", batch_size=BATCH, labels=["cpu"], shares=(1.0,))  # type: ignore[arg-type]


class _WithConstant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(x, 1) + torch.ones(3)


def test_tracing_leaves_no_mark_on_the_model() -> None:
    model = _WithConstant()
    names = [operation.name for operation in trace(model, torch.zeros(2, 3, 1, 1)).operations]
    assert names == [operation.name for operation in trace(model, torch.zeros(2, 3, 1, 1)).operations]
    assert set(vars(model)) == set(vars(_WithConstant()))


def test_only_the_gradient_that_hides_behind_weights_is_deferred() -> None:
    for strategy in ("kernel", "paper"):
        program = _program(strategy, (0.5, 0.5))  # type: ignore[arg-type]
        deferred = [index for index, one in enumerate(program.backward) if isinstance(one, Exchange) and one.deferred]
        assert len(deferred) == 1
        before, after = program.backward[deferred[0] - 1], program.backward[deferred[0] + 1]
        assert isinstance(before, Compute)
        assert isinstance(after, Compute)
        assert (before.gradients, after.gradients) == ("inputs", "parameters")
        assert before.segment == after.segment


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW = self.relu(self.conv1(x_BCHW))
        z_BCHW = self.conv2(y_BCHW)
        z_BCHW += y_BCHW
        return self.relu(z_BCHW).mean((2, 3))


@pytest.mark.parametrize(("in_place", "kernel"), [(True, False), (True, True), (False, False)])
def test_what_the_model_does_in_place_is_done_so_within_a_segment(in_place: bool, kernel: bool) -> None:
    model = _Residual()
    model.relu.inplace = in_place
    graph = trace(model, torch.empty(2, 3, 8, 8))
    shares = (0.4, 0.6)
    plan = plan_network(graph, "kernel" if kernel else "batch", batch_size=BATCH, labels=["cpu", "cpu"], shares=shares)
    steps = [
        one
        for segment in compile_program(graph, plan, BATCH).forward
        if isinstance(segment, Compute)
        for one in segment.steps
    ]
    found = {one.operation: one.in_place for one in steps}
    # Split by kernels, what `+=` writes to is a segment's input: another segment made it.
    assert found == {
        "conv1": False, "relu": in_place, "conv2": False, "add": not kernel, "relu_1": in_place, "mean": False
    }  # fmt: skip


def test_the_master_of_the_literal_method_carries_every_byte_and_that_of_kernel_only_some() -> None:
    graph = trace(network("4:8"), torch.zeros(2, 3, 32, 32))
    for strategy, all_of_it in (("paper", True), ("kernel", False)):
        plan = plan_network(graph, strategy, batch_size=8, labels=["cpu"] * 3, shares=[1 / 3] * 3)  # type: ignore[arg-type]
        exchanges = [one for one in compile_program(graph, plan, 8).instructions if isinstance(one, Exchange)]
        moved = [(one.master_elements, one.elements) for one in exchanges]
        assert sum(whole for _, whole in moved) > 0
        assert all(part <= whole for part, whole in moved)
        assert (sum(part for part, _ in moved) == sum(whole for _, whole in moved)) == all_of_it
