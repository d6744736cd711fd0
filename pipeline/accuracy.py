"""Is the classification performance unchanged? The same training by several strategies, and how well it classifies.

Training amplifies rounding: a convolution that is summed in another order is off in its last bit, and a pixel that then
wins a max pooling which it would have lost sends the training another way. How far apart that drives two runs is
measured by a control: `single` once more, from initial weights of which each is moved to a neighbouring float.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import xarray as xr
from distributed import Client
from torch import nn

from pipeline.cluster.devices import Member, format_device_set
from pipeline.plan.plan import Strategy
from pipeline.results.contracts import describe, validate_accuracy
from pipeline.results.kept import Kept
from pipeline.results.provenance import provenance
from pipeline.run.launch import OnProgress
from pipeline.run.recipe import OptimizerFactory
from pipeline.stored_images import StoredImages
from pipeline.training import fit

CONTROL = "control"
"""Stands for a strategy where trainings are listed: `single` from weights that are one rounding away."""


def compare_accuracy(
    build: Callable[[int], nn.Module],
    train: StoredImages,
    test: StoredImages,
    client: Client,
    *,
    members: Sequence[Member],
    network: str,
    batch_size: int,
    strategies: Sequence[Strategy],
    epochs: int,
    seeds: Sequence[int],
    optimizer: OptimizerFactory,
    calibration: xr.Dataset,
    kept: Kept | None,
    progress: Callable[[str], AbstractContextManager[OnProgress]],
) -> xr.Dataset:
    """For each seed train the network by each strategy: from the same weights, on the same images in the same order.

    Args:
        build: From a seed to the model with its initial weights.
        train: Training images.
        test: Images that are classified after every epoch.
        client: Of the cluster.
        members: The devices, which `calibration` measured in this order.
        network: Its name.
        batch_size: Images per step over all devices.
        strategies: Names of the strategies.
        epochs: Passes over the training images.
        seeds: Each of the initial weights and of the order of the images.
        optimizer: Makes the optimiser.
        calibration: What the devices can do.
        kept: Where finished trainings are kept, and taken from; None for nowhere.
        progress: From what is trained to what is called after each of its steps, and left after the last.

    Returns:
        accuracy(seed, strategy, epoch), loss(seed, strategy, step) and those of the control as
        `pipeline.results.contracts` describes them.

    Raises:
        InputError: As `fit`.
        RunError: As `fit`.
    """
    histories: dict[tuple[int, str], xr.Dataset] = {}
    for seed in seeds:
        model = build(seed)
        for name in (*strategies, CONTROL):
            part = f"seed-{seed}/{name}"
            history = kept.get(part) if kept is not None else None
            if history is None:
                with progress(f"{name} {network}, seed {seed}") as on_progress:
                    history = fit(
                        one_rounding_away(model, seed) if name == CONTROL else model,
                        train,
                        client,
                        members=members,
                        batch_size=batch_size,
                        epochs=epochs,
                        strategy="single" if name == CONTROL else name,  # type: ignore[arg-type]
                        optimizer=optimizer,
                        seed=seed,
                        validation=test,
                        calibration=calibration,
                        label=f"accuracy {network} {name}, seed {seed}",
                        on_progress=on_progress,
                    ).history
                if kept is not None:
                    kept.put(part, history)
            histories[seed, name] = history
    dataset = _over_seeds(histories, seeds, strategies)
    choice = {
        "network": network, "batch_size": batch_size, "epochs": epochs, "seeds": list(seeds),
        "optimizer": str(optimizer), "train_images": len(train), "test_images": len(test),
    }  # fmt: skip
    dataset.attrs = {
        **provenance(
            choice,
            emulated=any(member.device.emulated for member in members),
            data=train.source_name,
            threads={member.name: member.device.threads for member in members},
            hardware=[member.hardware for member in members],
        ),
        "network": network,
        "batch_size": batch_size,
        "device_set": format_device_set([member.device for member in members]),
        "test_images": len(test),
    }
    described = describe(dataset)
    validate_accuracy(described)
    return described


def one_rounding_away(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model in which every weight is the next number of its type, up or down at random by the seed."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in moved.parameters():
            up = torch.rand(weight.shape, generator=generator) < 0.5
            infinity = torch.full_like(weight, torch.inf)
            weight.copy_(torch.nextafter(weight, torch.where(up, infinity, -infinity)))
    return moved


def _over_seeds(
    histories: dict[tuple[int, str], xr.Dataset], seeds: Sequence[int], strategies: Sequence[str]
) -> xr.Dataset:
    """The histories, all of the same epochs and steps, as one data set."""
    first = histories[seeds[0], CONTROL]
    variables: dict[str, Any] = {}
    for name, dim in (("accuracy", "epoch"), ("loss", "step")):
        split = [[histories[seed, strategy][name].values for strategy in strategies] for seed in seeds]
        variables[name] = (("seed", "strategy", dim), np.array(split))
        control = [histories[seed, CONTROL][name].values for seed in seeds]
        variables[f"control_{name}"] = (("seed", dim), np.array(control))
    coordinates = {"seed": list(seeds), "strategy": np.array(strategies, object)}
    return xr.Dataset(variables, coordinates | {dim: first[dim].values for dim in ("epoch", "step")})
