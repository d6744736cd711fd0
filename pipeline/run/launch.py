"""Start a plan on the devices it names, if they have the memory: one job per rank, and back come their accounts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from distributed import Client
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from pipeline.cluster.devices import Member
from pipeline.cluster.gang import run_gang
from pipeline.data.loading import example_batch
from pipeline.graph.operations import Graph
from pipeline.links import Link
from pipeline.plan.fitting import Room
from pipeline.plan.plan import Plan
from pipeline.run.callbacks import Callback
from pipeline.run.feeding import feed_of
from pipeline.run.memory import bytes_of
from pipeline.run.metrics import Metric
from pipeline.run.parts import check_portable, parts_of
from pipeline.run.recipe import CrossEntropy, OptimizerFactory, Recipe, states_of
from pipeline.run.worker import Account, Job, process_memory, run_rank

SGD: OptimizerFactory = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
PLAIN = Recipe(loss=CrossEntropy(), optimizer=SGD)

OnProgress = Callable[[int, dict[str, float]], None]

__all__ = ["PLAIN", "SGD", "OnProgress", "example_batch", "held_memory", "image_bytes", "room_for", "run_plan"]


def run_plan(
    client: Client,
    members: Sequence[Member],
    plan: Plan,
    graph: Graph,
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    validation: Dataset[Any] | None = None,
    recipe: Recipe | None = None,
    loader: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    metrics: Mapping[str, Metric] | None = None,
    indices: list[list[list[Any]]],
    stream: tuple[int, int | None] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int,
    label: str,
    link: Link | None = None,
    synchronised: bool = False,
    profiled: int = 0,
    keep_weights: bool = True,
    keep_gradients: bool = False,
    keep_steps: int = 16,
    on_progress: OnProgress | None = None,
) -> list[Account]:
    """Run ``plan`` on the devices it names, one long task per rank; the account of every rank.

    ``members`` are the devices that the plan was made for; ``link`` is emulated between them. ``indices`` are those of
    the samples by epoch and step; where they are empty, ``stream`` says how often a stream is read, and after how many
    steps at most it ends. ``shapes`` are those of one image, which a batch of another is told apart by. Raises
    ``RunError`` when a rank fails or is lost.
    """
    ranks = [members[device] for device in plan.devices]
    data_parallel = plan.strategy == "ddp"
    parts = None if data_parallel else parts_of(model, graph)
    own_code = data_parallel or (validation is not None and not graph.evaluable)
    if own_code:
        check_portable(model, f"{type(model).__name__} runs by its own code here, and")
    feed = feed_of(dataset, validation, plan, loader or {}, indices=indices, stream=stream, shapes=shapes, seed=seed)
    common = {
        "graph": graph, "plan": plan, "recipe": recipe or PLAIN, "feed": feed, "callbacks": tuple(callbacks),
        "metrics": metrics, "seed": seed, "link": link, "synchronised": synchronised, "profiled": profiled,
        "keep_weights": keep_weights, "keep_gradients": keep_gradients, "keep_steps": keep_steps,
    }  # fmt: skip
    arguments = []
    for rank in range(len(ranks)):
        whole = rank == 0 or data_parallel
        job = Job(
            parts=parts if rank == 0 else None,
            model=model if whole and own_code else None,
            dataset=dataset if whole else None,
            validation=validation if rank == 0 else None,
            **common,  # type: ignore[arg-type]
        )
        # Scattered, because a job with a model and images is too large to travel within a task graph.
        arguments.append((client.scatter(job, workers=[ranks[rank].address], hash=False),))
    accounts: list[Account] = run_gang(client, ranks, run_rank, arguments, label=label, on_progress=on_progress)
    return accounts


def room_for(
    members: Sequence[Member],
    dataset: Dataset[Any],
    *,
    optimizer: OptimizerFactory,
    validation: Dataset[Any] | None = None,
) -> Room:
    """The room of ``members`` for a training, with that of their processes.

    Images that do not say what they take in memory count for nothing.
    """
    none = np.zeros(len(members))
    images, to_validate = (
        none if one is None else np.nan_to_num(image_bytes(members, one)) for one in (dataset, validation)
    )
    memory = np.array([float(member.memory) for member in members])
    return Room.of(memory, images=images, validation=to_validate, states=states_of(optimizer))


def image_bytes(members: Sequence[Member], dataset: Dataset[Any]) -> NDArray[np.float64]:
    """What a data set takes in the memory of each, (member) in bytes, if it is there; NaN where it does not say.

    It takes nothing on a GPU, whose host has the images.
    """
    on_host = np.array([member.device.kind == "cpu" for member in members])
    found: NDArray[np.float64] = np.where(on_host, bytes_of(dataset), 0.0)
    return found


def held_memory(client: Client, members: Sequence[Member]) -> NDArray[np.float64]:
    """What the process of each member holds before it trains, (member) in bytes; raises ``RunError`` if one is lost."""
    held = run_gang(client, members, process_memory, [()] * len(members), label="a look at the memory")
    return np.array(held, dtype=float)
