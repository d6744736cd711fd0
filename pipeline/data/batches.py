"""A batch: the inputs of a model and what the loss is told of them.

The inputs are one tensor of images, a tuple (or list) of tensors, which the model is given one after the other, or a
dictionary of tensors, which it is given by name. What the loss is told, the target, may be nested in any way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipeline.errors import InputError, PipelineError

Inputs = torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]
Batch = tuple[Inputs, Any]


def split_batch(batch: Any, source: str, error: type[PipelineError] = InputError) -> Batch:
    """The inputs and the target of what a data set gives, or a loader makes of it.

    Raises ``error``, in a sentence that begins with ``source``, where it is no such pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        count = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise error(
            f"{source} is {type(batch).__name__}{count}: a data set must give pairs of an image tensor (C, H, W), or a "
            "tuple or dictionary of tensors, and a label, which may be a tuple or dictionary of several"
        )
    inputs, target = batch
    if isinstance(inputs, torch.Tensor):
        return inputs, target
    if isinstance(inputs, Mapping):
        named = {str(name): value for name, value in inputs.items()}
        unfit = next((name for name, value in named.items() if not isinstance(value, torch.Tensor)), None)
        if named and unfit is None:
            return named, target
    elif isinstance(inputs, tuple | list):
        unfit = next((str(place) for place, one in enumerate(inputs) if not isinstance(one, torch.Tensor)), None)
        if inputs and unfit is None:
            return tuple(inputs), target
    else:
        unfit = None
    what = type(inputs).__name__ if unfit is None else f"{type(inputs).__name__} whose part {unfit} is no tensor"
    raise error(
        f"{source} has {what} in place of images: a data set must give pairs of an image tensor (C, H, W), or a tuple "
        "or dictionary of tensors, and a label"
    )


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns for the inputs."""
    if isinstance(inputs, torch.Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def images_in(inputs: Inputs) -> int:
    """How many images a batch has: the length of the first axis of its first tensor."""
    first = next(iter(_named(inputs).values()))
    return len(first) if first.dim() else 1


def shapes_of(inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """The shape of one image of every input, by its name or place; ``""`` of a single tensor."""
    return {name: tuple(tensor.shape[1:]) for name, tensor in _named(inputs).items()}


def moved(values: Any, device: torch.device) -> Any:
    """The same, however nested, with all its tensors on a device."""
    return pytree.tree_map(lambda one: one.to(device) if isinstance(one, torch.Tensor) else one, values)


def prepared(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """The inputs on a device, images in the number type of the model.

    Of several inputs those of whole numbers, such as positions, stay whole.
    """
    if isinstance(inputs, torch.Tensor):
        return inputs.to(device, dtype)

    def cast(one: torch.Tensor) -> torch.Tensor:
        return one.to(device, dtype if one.is_floating_point() else one.dtype)

    if isinstance(inputs, dict):
        return {name: cast(one) for name, one in inputs.items()}
    return tuple(map(cast, inputs))


def _named(inputs: Inputs) -> dict[str, torch.Tensor]:
    if isinstance(inputs, torch.Tensor):
        return {"": inputs}
    return inputs if isinstance(inputs, dict) else {str(place): one for place, one in enumerate(inputs)}
