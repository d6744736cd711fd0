"""The model that a user gave, made ready: with all its weights made, and a warning of a number type that is slow."""

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from distributed import Client
from torch import nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from pipeline.cluster.devices import Member
from pipeline.data.batches import Inputs, call, prepared
from pipeline.data.randomness import seeded
from pipeline.errors import InputError, first_line
from pipeline.graph.copies import model_dtype

_HALF = (torch.bfloat16, torch.float16)
_SLOW = 2.0
"""How many times as long as in float32 a convolution must take to be told of."""
_REPETITIONS = 3


class SlowNumbersWarning(UserWarning):
    """A device computes in the model's number type far slower than in float32."""


def with_all_weights(model: nn.Module, inputs: Inputs, seed: int) -> nn.Module:
    """The model, or where it has lazy layers a copy that has seen ``inputs``, in evaluation: no statistics move.

    The weights made so are those that a plain loop seeded with ``seed`` would begin with. Raises ``InputError`` where
    the model does not take the inputs.
    """
    if not any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        return model
    # torch cannot copy a buffer that has no size yet, only parameters.
    unmade = (one for one in model.buffers() if is_lazy(one))
    made: Any = UninitializedBuffer
    memo = {id(one): made(device=one.device, dtype=one.dtype) for one in unmade}
    ready = copy.deepcopy(model, memo)
    modes = {one: one.training for one in ready.modules()}
    dtype = model_dtype(model)
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    try:
        with seeded(seed), torch.no_grad():
            call(ready.eval(), prepared(inputs, device, dtype))
    except Exception as error:
        raise InputError(f"the lazy layers of the model do not take the first images: {first_line(error)}") from error
    for one in ready.modules():
        one.training = modes.get(one, True)
    if any(map(is_lazy, (*ready.parameters(), *ready.buffers()))):
        raise InputError(
            "the model has lazy layers that its forward does not call: give them their sizes, or remove them"
        )
    return ready


def warn_of_slow_numbers(model: nn.Module, client: Client, members: Sequence[Member]) -> None:
    """Warn once for each kind of device whose CPU lacks the instructions for a model in half precision."""
    dtype = model_dtype(model)
    if dtype not in _HALF:
        return
    first = {member.device.label: member for member in reversed(members) if member.device.kind == "cpu"}
    found = client.run(slowdown, dtype, workers=[member.address for member in first.values()])
    for label, member in first.items():
        if said := slow_numbers(label, dtype, found[member.address]):
            warnings.warn(said, SlowNumbersWarning, stacklevel=3)


def slow_numbers(label: str, dtype: torch.dtype, factor: float) -> str | None:
    """What to warn of where a device takes ``factor`` times as long as in float32; None where it does not matter."""
    if factor < _SLOW:
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"the model computes in {name}, and a small convolution on {label} takes {factor:.2g} times as long so as in "
        "float32, as its processor lacks the instructions: train it in float32 there (model.float())"
    )


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a small convolution takes on this machine's CPU; measured once."""
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest time of a small convolution, after one to warm up."""
    layer, x_BCHW = nn.Conv2d(8, 8, 3).to(dtype), torch.ones(1, 8, 16, 16, dtype=dtype)
    times = []
    with torch.no_grad():
        for _ in range(_REPETITIONS + 1):
            start = time.perf_counter()
            layer(x_BCHW)
            times.append(time.perf_counter() - start)
    return min(times[1:])
