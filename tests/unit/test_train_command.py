"""What the command `train` makes of its options, and what it says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.cli.epochs import EpochLines
from pipeline.cli.recipe import optimizer_named, schedule_named, updates_of
from pipeline.cli.train import _epochs_made, plan_headline
from pipeline.errors import InputError
from pipeline.graph.trace import trace
from pipeline.networks import network
from pipeline.plan.strategies import plan_network
from pipeline.run.callbacks import Epoch
from pipeline.run.recipe import Recipe, check_recipe


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sgd", {}, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0}),
        ("sgd", {"learning_rate": 0.5, "momentum": 0.0, "weight_decay": 0.1}, {"lr": 0.5, "momentum": 0.0}),
        ("adam", {}, {"lr": 0.001, "weight_decay": 0}),
        ("adamw", {}, {"lr": 0.001, "weight_decay": 0.01}),
        ("adamw", {"weight_decay": 0.0}, {"weight_decay": 0.0}),
        ("rmsprop", {"momentum": 0.5}, {"lr": 0.01, "momentum": 0.5}),
        ("adagrad", {"learning_rate": 0.1}, {"lr": 0.1}),
    ],
)
def test_an_optimizer_has_its_usual_values_where_none_are_given(
    name: str, options: dict[str, float], expected: dict[str, float]
) -> None:
    factory = optimizer_named(name, **options)
    check_recipe(Recipe(loss=nn.CrossEntropyLoss(), optimizer=factory))
    made = factory([nn.Parameter(torch.zeros(2))])
    assert type(made).__name__.lower() == name
    assert {key: made.defaults[key] for key in expected} == expected


def rates(updates: int, per_epoch: int, **given: Any) -> list[float]:
    """The learning rate of each update."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    options = schedule_named(given.pop("name"), updates=updates, epochs=updates // per_epoch, **given)
    scheduler = options["scheduler"](optimizer) if options else None
    found = []
    for update in range(1, updates + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None and (options["scheduled_by"] == "step" or update % per_epoch == 0):
            scheduler.step()
    return found


def test_no_schedule_leaves_the_learning_rate() -> None:
    assert rates(6, 2, name="none") == [1.0] * 6


def test_steps_come_after_a_third_of_the_epochs_or_as_asked_for() -> None:
    assert rates(6, 1, name="step") == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(6, 2, name="step", step_size=1, gamma=0.5) == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])


def test_a_cosine_falls_from_update_to_update_until_the_last() -> None:
    expected = [(1 + math.cos(math.pi * update / 8)) / 2 for update in range(8)]
    assert rates(8, 4, name="cosine") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "accumulate", "updates"),
    [(3, None, 1, 12), (3, None, 3, 6), (3, 5, 1, 5), (3, 5, 3, 3), (2, 100, 4, 2), (1, 2, 9, 1)],
)
def test_updates_are_counted_as_the_training_makes_them(
    epochs: int, max_steps: int | None, accumulate: int, updates: int
) -> None:
    assert updates_of(25, 8, epochs=epochs, max_steps=max_steps, accumulate=accumulate) == updates


def test_a_schedule_refuses_what_is_not_its_own() -> None:
    with pytest.raises(InputError, match="--gamma belongs to --schedule step, not to cosine"):
        schedule_named("cosine", epochs=1, updates=1, gamma=0.5)


def test_every_epoch_is_told_once_with_its_speed_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    lines = EpochLines(3)
    first = Epoch(number=1, loss=2.5, accuracy=0.125, seconds=3.0, images=500, training_seconds=2.0)
    lines.show(first)
    lines.show_all([first])
    lines.show_all([Epoch(number=2, loss=2.0, accuracy=None, seconds=2.0)])
    lines.show_all([Epoch(number=3, loss=1.0, accuracy=None, seconds=2.0, metrics={"iou": 0.25})])
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 1 of 3: loss 2.5000, test accuracy 12.5 %, 250 images/s (3 s, 6 s left)",
        "Epoch 2 of 3: loss 2.0000 (2 s, 2 s left)",
        "Epoch 3 of 3: loss 1.0000, iou 0.25 (2 s)",
    ]


@pytest.mark.parametrize(("max_steps", "begun"), [(None, 5), (1, 1), (4, 1), (5, 2), (100, 5)])
def test_epochs_that_the_last_step_leaves_out_are_not_counted(max_steps: int | None, begun: int) -> None:
    assert _epochs_made(25, 8, 5, max_steps) == begun


class Branching(nn.Module):
    """Which cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dense = nn.Conv2d(3, 4, 5), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.conv(x if x.sum() > 0 else -x).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "strategy", "says"),
    [
        (network("4:6"), "kernel", "100 % of the convolution FLOPs are split."),
        (network("4:6"), "single", "0 % of the convolution FLOPs are split."),
        (Branching(), "kernel", "as they are, on one device, run 1 of its parts: the model (torch.export: "),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), "batch", "No convolution was found."),
    ],
    ids=["a chain", "one device", "a branch on values", "no convolution"],
)
def test_the_headline_of_a_plan_says_what_is_split_and_what_is_not(model: nn.Module, strategy: Any, says: str) -> None:
    graph = trace(model, torch.zeros(2, 3, 32, 32))
    plan = plan_network(graph, strategy, batch_size=8, labels=["cpu"] * 2, shares=(0.5, 0.5))
    assert says in plan_headline(plan, graph)
