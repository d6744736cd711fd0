"""Whether a model trains to the same result split as whole: a few steps both ways, in float64, and how far they differ.

For whoever wants to know before a long run of a model of their own; the table of torchvision's models is made so, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from distributed import Client
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset

from pipeline.cluster.devices import Member
from pipeline.compiled import without_compiler
from pipeline.data.randomness import seed_all
from pipeline.graph.copies import copied, tensors_of
from pipeline.graph.operations import Opaque
from pipeline.graph.trace import trace
from pipeline.plan.plan import Strategy
from pipeline.plan.strategies import plan_network
from pipeline.run.launch import SGD, run_plan
from pipeline.run.recipe import Recipe

TOLERANCE = 1e-9
STRATEGIES: tuple[Strategy, ...] = ("kernel", "batch")
SHARES: tuple[tuple[float, ...], ...] = ((0.7, 0.3), (0.5, 0.3, 0.2))
"""Fractions of every layer, or of every batch, for two and for three uneven devices."""
_SEED = 0
_FLOOR = 1e-6
"""A difference counts relative to its tensor's largest entry, or to this part of the model's if that is more: what is
zero but for rounding, such as the gradient of a bias before BatchNorm, has no digits to agree in."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a split training ended from the whole one; differences are relative."""

    strategy: Strategy
    shares: tuple[float, ...]
    loss: float
    """Largest difference of a step's loss."""
    gradients: float
    """Of the last step."""
    weights: float
    """After the last step."""
    statistics: float
    """Of running statistics and other buffers."""
    split: float
    """True share of the convolutions' FLOPs that ran split; NaN without convolutions."""
    opaque: tuple[Opaque, ...]
    """The submodules that ran as they are."""
    seconds: float
    """Time of the split run, its start included."""

    @property
    def worst(self) -> float:
        """The largest of the differences of loss, weights and statistics.

        Not of gradients: behind BatchNorm many are nearly zero, the rest of a sum that cancels, and have fewer digits
        to agree in; what there is of them is in the weights.
        """
        return _largest([self.loss, self.weights, self.statistics])

    @property
    def is_exact(self) -> bool:
        """Whether all differences are within rounding."""
        return math.isfinite(self.worst) and self.worst <= TOLERANCE


@dataclass(frozen=True)
class _Trained:
    losses: list[float]
    gradients: Mapping[str, torch.Tensor]
    state: Mapping[str, torch.Tensor]


def check_parity(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    client: Client,
    members: Sequence[Member],
    *,
    classes: int = 10,
    batch_size: int = 6,
    steps: int = 2,
    strategies: Sequence[Strategy] = STRATEGIES,
    shares: Sequence[Sequence[float]] = SHARES,
) -> Iterator[Parity]:
    """Train ``model`` for some steps whole, and split with every strategy and all shares; one result after the other.

    ``image_shape`` is (C, H, W); images and labels are random. Where the model returns several outputs, the loss is the
    sum of the cross-entropies of all. The last batch has one image less than the others. Raises ``InputError`` if the
    model does not take such images, and ``RunError`` when a run fails.
    """
    model = copied(without_compiler(model)).double().train()
    count = batch_size * steps - 1
    generator = torch.Generator().manual_seed(_SEED)
    dataset = TensorDataset(
        torch.randn(count, *image_shape, generator=generator, dtype=torch.float64),
        torch.randint(0, classes, (count,), generator=generator),
    )
    indices = [[list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]]
    graph = trace(model, dataset.tensors[0][:2])
    whole = _train_whole(model, dataset, indices[0])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for strategy in strategies:
        for fractions in shares:
            chosen = members[: len(fractions)]
            labels = [member.device.label for member in chosen]
            start = time.monotonic()
            plan = plan_network(graph, strategy, batch_size=batch_size, labels=labels, shares=fractions)
            account = run_plan(
                client, chosen, plan, graph, model, dataset,
                recipe=Recipe(loss=_loss, optimizer=SGD), indices=indices, seed=_SEED, keep_gradients=True,
                label=f"parity {type(model).__name__} {strategy}",
            )[0]  # fmt: skip
            assert account.weights is not None
            assert account.gradients is not None
            state = {name: whole.state[name] for name in account.weights}
            yield Parity(
                strategy=strategy,
                shares=tuple(fractions),
                loss=_largest([abs(a - b) / abs(b) for a, b in zip(account.losses, whole.losses, strict=True)]),
                gradients=_difference(account.gradients, whole.gradients),
                weights=_difference(account.weights, {name: state[name] for name in state if name in trained}),
                statistics=_difference(account.weights, {name: state[name] for name in state if name not in trained}),
                split=plan.split,
                opaque=graph.opaque,
                seconds=time.monotonic() - start,
            )


def _train_whole(model: nn.Module, dataset: TensorDataset, batches: Sequence[Sequence[int]]) -> _Trained:
    """A plain torch loop."""
    model = copied(model)
    seed_all(_SEED)
    optimizer = SGD([parameter for parameter in model.parameters() if parameter.requires_grad])
    x_BCHW, y_B = dataset.tensors
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = _loss(model(x_BCHW[list(batch)]), y_B[list(batch)])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return _Trained(losses, gradients, tensors_of(model))


def _loss(output: object, y_B: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, summed over all that the model returns."""
    total = torch.zeros((), dtype=torch.float64, device=y_B.device)
    for one in pytree.tree_leaves(output):
        total = total + nn.functional.cross_entropy(one, y_B)
    return total


def _difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between tensors of one name, relative to the largest entry of each."""
    wanted = {name: tensor.detach().double() for name, tensor in expected.items() if tensor.numel()}
    sizes = {name: float(tensor.abs().max()) for name, tensor in wanted.items()}
    least = max(_FLOOR * max(sizes.values(), default=0.0), 1e-30)
    return _largest([
        float((found[name].detach().double() - tensor).abs().max()) / max(sizes[name], least)
        for name, tensor in wanted.items()
    ])  # fmt: skip


def _largest(values: Sequence[float]) -> float:
    """The largest value, 0 of none; NaN if one is."""
    return float(torch.tensor([0.0, *values], dtype=torch.float64).max())
