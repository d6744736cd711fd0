"""`train`: one network on many devices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.epochs import EpochNews, shown_epochs
from pipeline.cli.images import prepared_images
from pipeline.cli.options import (
    CalibrationOption,
    DataOption,
    DevicesOption,
    ImageSizeOption,
    NetworkOption,
    SchedulerOption,
    SeedOption,
)
from pipeline.cli.ranks import checked_strategy, cluster, costs_of, say_if_cached
from pipeline.cli.recipe import (
    GammaOption,
    LearningRateOption,
    MomentumOption,
    OptimizerOption,
    ScheduleOption,
    StepSizeOption,
    WeightDecayOption,
    check_schedule,
    optimizer_named,
    schedule_named,
    updates_of,
)
from pipeline.errors import InputError
from pipeline.progress import Progress

if TYPE_CHECKING:
    from pipeline.graph.operations import Graph
    from pipeline.plan.plan import Plan

_NAMES_SHOWN = 8


def train(
    network: NetworkOption,
    data: DataOption = "auto",
    image_size: ImageSizeOption = None,
    devices: DevicesOption = None,
    scheduler: SchedulerOption = None,
    strategy: Annotated[
        str, typer.Option("--strategy", help="How to split: single, ddp, equal, paper, kernel, batch or auto.")
    ] = "auto",
    shares: Annotated[
        str | None,
        typer.Option(
            "--shares", help="Part of every layer for each device, such as 0.7,0.3, instead of a calibration."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="JSON file that `plan` wrote, instead of a strategy.")
    ] = None,
    calibration: CalibrationOption = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Images per step over all devices; 64, or the plan's.")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training images.")] = 1,
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="Stop after so many steps.")] = None,
    optimizer: OptimizerOption = "sgd",
    learning_rate: LearningRateOption = None,
    momentum: MomentumOption = None,
    weight_decay: WeightDecayOption = None,
    schedule: ScheduleOption = "none",
    step_size: StepSizeOption = None,
    gamma: GammaOption = None,
    clip_norm: Annotated[
        float | None, typer.Option("--clip-norm", help="Largest norm of all gradients together.")
    ] = None,
    accumulate: Annotated[
        int, typer.Option("--accumulate", min=1, help="Batches whose gradients are averaged for one update.")
    ] = 1,
    seed: SeedOption = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            help="File for the trained weights: .safetensors, or under any other name a state dict for torch.load.",
        ),
    ] = None,
) -> None:
    """Train a network with its layers split over unequal devices."""
    from torch import nn

    from pipeline.calibration.cache import cache_folder
    from pipeline.checkpoint import check_checkpoint
    from pipeline.graph.trace import trace
    from pipeline.networks import check_name
    from pipeline.networks import network as build
    from pipeline.plan.files import read_plan
    from pipeline.run.launch import example_batch
    from pipeline.run.recipe import Recipe, check_recipe
    from pipeline.training import fit

    # Whatever can be refused is, before images are read and processes started.
    chosen, parts = checked_strategy(strategy), _parsed_shares(shares)
    given = read_plan(plan) if plan is not None else None
    if given is not None and (parts is not None or chosen != "auto"):
        raise InputError("--plan already says how to split: leave --strategy and --shares out")
    if calibration is not None and (given is not None or parts is not None):
        raise InputError("--calibration is for a plan that is made now: leave it out beside --plan or --shares")
    batch_size = batch_size or (given.batch_size if given is not None else 64)
    update = optimizer_named(optimizer, learning_rate, momentum, weight_decay)
    check_schedule(schedule, step_size, gamma)
    check_recipe(Recipe(loss=nn.CrossEntropyLoss(), optimizer=update, clip_norm=clip_norm, accumulate=accumulate))
    check_name(network)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    with prepared_images(data, image_size, network=network) as (images, test_images):
        model = build(network, classes=len(images.classes), image_shape=images.image_shape, seed=seed)
        with Progress(f"capture {network}"):
            graph = trace(model, example_batch(images))
        updates = updates_of(len(images), batch_size, epochs=epochs, max_steps=max_steps, accumulate=accumulate)
        with (
            cluster(devices, scheduler, network) as (client, members),
            Progress(f"prepare {network}") as progress,
            shown_epochs(client, _epochs_made(len(images), batch_size, epochs, max_steps)) as (news, lines),
        ):
            costs = None
            if calibration is not None:
                costs = costs_of(calibration, network, model, images, client, members, batch_size, graph)
            result = fit(
                model,
                images,
                client,
                members=members,
                batch_size=batch_size,
                epochs=epochs,
                max_steps=max_steps,
                strategy=chosen,
                shares=parts,
                plan=given,
                calibration=costs,
                cache=cache_folder(),
                optimizer=update,
                clip_norm=clip_norm,
                accumulate=accumulate,
                seed=seed,
                validation=test_images,
                callbacks=[news],
                checkpoint=checkpoint,
                progress=progress,
                network=network.strip(),
                graph=graph,
                **schedule_named(schedule, epochs=epochs, updates=updates, step_size=step_size, gamma=gamma),
            )
            lines.show_all(told for one in result.callbacks if isinstance(one, EpochNews) for told in one.epochs)
    if result.calibration is not None:
        say_if_cached(result.calibration)
    print(result.plan.table())
    print(plan_headline(result.plan, graph))
    history, step_time = result.history, result.timing.step_time
    print(
        f"{history.sizes['step']} steps of {float(step_time.median()):.3g} s (median), "
        f"loss {float(history.loss[0]):.4f} at first and {float(history.loss[-1]):.4f} at last."
    )
    if checkpoint is not None:
        print(f"Weights written to {checkpoint}.")


def plan_headline(plan: Plan, graph: Graph) -> str:
    """How much of the convolutions is split, and what could not be, in one sentence."""
    share, left = plan.split, graph.opaque
    split = (
        "No convolution was found" if math.isnan(share) else f"{100 * share:.4g} % of the convolution FLOPs are split"
    )
    if plan.strategy in ("single", "ddp") or not left:
        return f"{split}."
    named = "; ".join(map(str, left[:_NAMES_SHOWN]))
    more = "; ..." if len(left) > _NAMES_SHOWN else ""
    return f"{split}; as they are, on one device, run {len(left)} of its parts: {named}{more}."


def _epochs_made(images: int, batch_size: int, epochs: int, max_steps: int | None) -> int:
    """How many epochs a training begins that ends after so many steps at most."""
    return min(epochs, -(-max_steps // -(-images // batch_size))) if max_steps else epochs


def _parsed_shares(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"the shares {text!r} are not numbers with commas between them, such as 0.7,0.3") from None
