"""Is the classification performance unchanged? The same training by several strategies, and how well it classifies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import xarray as xr
from distributed import Client
from torch import nn

from pipeline.cluster.devices import Member, format_device_set
from pipeline.datasets import StoredImages
from pipeline.plan.plan import Strategy
from pipeline.results.contracts import describe, validate_accuracy
from pipeline.results.provenance import provenance
from pipeline.run.launch import OnProgress
from pipeline.run.recipe import OptimizerFactory
from pipeline.training import fit


def compare_accuracy(
    model: nn.Module,
    train: StoredImages,
    test: StoredImages,
    client: Client,
    *,
    members: Sequence[Member],
    network: str,
    batch_size: int,
    strategies: Sequence[Strategy],
    epochs: int,
    seed: int,
    optimizer: OptimizerFactory,
    calibration: xr.Dataset,
    progress: Callable[[str], AbstractContextManager[OnProgress]],
) -> xr.Dataset:
    """Train copies of `model` by each strategy: from the same weights, on the same images in the same order.

    Args:
        model: With its initial weights; left as it is.
        train: Training images.
        test: Images that are classified after every epoch.
        client: Of the cluster.
        members: The devices, which `calibration` measured in this order.
        network: Its name.
        batch_size: Images per step over all devices.
        strategies: Names of the strategies.
        epochs: Passes over the training images.
        seed: Of the order of the images.
        optimizer: Makes the optimiser.
        calibration: What the devices can do.
        progress: From the name of a strategy to what is called after each of its steps, and left after the last.

    Returns:
        accuracy(strategy, epoch) and loss(strategy, step) as `pipeline.results.contracts` describes them.

    Raises:
        InputError: As `fit`.
        RunError: As `fit`.
    """
    histories = []
    for strategy in strategies:
        with progress(strategy) as on_progress:
            result = fit(
                model,
                train,
                client,
                members=members,
                batch_size=batch_size,
                epochs=epochs,
                strategy=strategy,
                optimizer=optimizer,
                seed=seed,
                validation=test,
                calibration=calibration,
                label=f"accuracy {network} {strategy}",
                on_progress=on_progress,
            )
        histories.append(result.history)
    dataset = xr.concat(histories, dim=xr.DataArray(np.array(strategies, object), dims="strategy", name="strategy"))
    choice = {
        "network": network, "batch_size": batch_size, "epochs": epochs, "seed": seed, "optimizer": str(optimizer),
        "train_images": len(train), "test_images": len(test),
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
    }
    described = describe(dataset)
    validate_accuracy(described)
    return described
