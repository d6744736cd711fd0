"""A specimen trained by a plain loop and by the engine, and how far they end apart."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from distributed import Client
from torch import nn

import pipeline
from pipeline.graph.trace import trace
from tests.zoo.specimen import BATCH, SEED, Specimen, seeded

STRATEGIES = ("kernel", "batch")
SHARES = (0.6, 0.4)
DEVICES = (pipeline.Device("cpu"), pipeline.Device("cpu", speed=0.5))
SGD = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
_FLOOR = 1e-6
"""A difference counts relative to its tensor's largest entry, or to this part of the network's if that is more."""
_MOVES = (11, 12)
"""Seeds of the loops whose weights are moved by one rounding."""


@dataclass(frozen=True)
class Trained:
    """What a training ends with."""

    losses: list[float]
    state: Mapping[str, torch.Tensor]

    def apart(self, right: Trained) -> dict[str, float]:
        """How far each loss and each tensor is from the right one, relatively; infinite where one is missing."""
        if len(self.losses) != len(right.losses) or set(self.state) != set(right.state):
            return {"what there is": math.inf}
        found = {
            f"loss {step}": abs(one - other) / max(abs(other), 1e-12)
            for step, (one, other) in enumerate(zip(self.losses, right.losses, strict=True))
        }
        sizes = {name: float(tensor.abs().max()) for name, tensor in right.state.items() if tensor.numel()}
        least = max(_FLOOR * max(sizes.values(), default=0.0), 1e-30)
        for name, size in sizes.items():
            difference = float((self.state[name].double() - right.state[name].double()).abs().max())
            found[name] = difference / max(size, least)
        # What is not a number on both sides is no difference to find; on one side it is the largest.
        return {name: math.inf if math.isnan(value) else value for name, value in found.items()}


def by_plain_loop(specimen: Specimen, moved: int | None = None) -> Trained:
    """Train as any tutorial would; with `moved`, a seed, from weights that are off by one rounding up or down."""
    model = specimen.build()
    if moved is not None:
        move(model, moved)
    images, labels = specimen.dataset().tensors
    optimizer = SGD([parameter for parameter in model.parameters() if parameter.requires_grad])
    losses = []
    seeded(SEED)
    for start in range(0, len(images), BATCH):
        optimizer.zero_grad()
        loss = specimen.loss(model(images[start : start + BATCH]), labels[start : start + BATCH])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Trained(losses, model.state_dict())


def by_moved_loops(specimen: Specimen, right: Trained) -> dict[str, float]:
    """How far each loss and tensor gets from the plain loop's by one rounding of the first weights, at most."""
    moved = [by_plain_loop(specimen, moved=seed).apart(right) for seed in _MOVES]
    return {name: max(one.get(name, math.inf) for one in moved) for name in moved[0]}


def by_engine(specimen: Specimen, client: Client, strategy: pipeline.Strategy) -> tuple[Trained, pipeline.Plan]:
    """Train split over the devices of `client`."""
    result = pipeline.fit(
        specimen.build(), specimen.dataset(), client=client, batch_size=BATCH, epochs=1, strategy=strategy,
        shares=SHARES, optimizer=SGD, loss=specimen.loss, shuffle=False, seed=SEED,
    )  # fmt: skip
    losses = [float(loss) for loss in result.history.loss.values.reshape(-1)]
    return Trained(losses, result.model.state_dict()), result.plan


def captured(specimen: Specimen) -> tuple[pipeline.Graph, float]:
    """The graph of a specimen and the seconds it took to capture."""
    model, images = specimen.build(), specimen.dataset().tensors[0]
    start = time.perf_counter()
    graph = trace(model, images[:2])
    return graph, time.perf_counter() - start


def opaque_parts(graph: pipeline.Graph, plan: pipeline.Plan) -> list[tuple[str, str]]:
    """Name and reason of each part that runs whole on one device, for the engine of before and after torch.export."""
    if hasattr(graph, "opaque"):
        return [(part.name, part.reason) for part in graph.opaque]
    return [(name, "unknown operation") for name in plan.on_master(graph)]


def split_part(graph: pipeline.Graph, plan: pipeline.Plan) -> float:
    """The part of the convolutions' FLOPs that ran split, for the engine of before and after torch.export."""
    return float(plan.split if hasattr(plan, "split") else plan.split_convolutions(graph))


def move(model: nn.Module, seed: int) -> None:
    """Multiply every weight by 1 plus or minus one rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.dtype) * 2 - 1
            parameter.mul_(1 + signs * torch.finfo(parameter.dtype).eps)
