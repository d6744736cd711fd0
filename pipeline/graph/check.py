"""Whether captured calls do what the model does: two training steps of both, on few images, with the same random state.

Compared are what they return, the gradients of parameters, the buffers, and what they draw of torch's, numpy's and
Python's random numbers. What a model keeps from call to call shows in the second one.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count

from pipeline.errors import first_line
from pipeline.graph.copies import Inputs, copied, gradients_kept, set_mode, tensors_of
from pipeline.graph.nodes import Node, leaves, mapped

CALLS = 2
_SEED = 20_171_206
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Relative, by number type; captured calls mostly agree bit by bit, but sums of gradients may have another order."""
_ROUGH = 0.05
"""Of the narrow types."""
_FLOORS = {torch.float64: 1e-6}
_FLOOR = 1e-3
"""What is nothing but rounding, as the gradient of a bias before BatchNorm, counts relative to this part of the largest
gradient of the model."""


@dataclass
class Behaviour:
    """What some calls of a model did."""

    outputs: list[Any] = field(default_factory=list)
    """Of each call what it returned, without gradients."""
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Summed over the calls, of the parameters that got one."""
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    draws: list[Any] = field(default_factory=list)
    """After each call, the states of torch's, numpy's and Python's generators."""


def behaviour(
    call: Callable[[], Any], tensors: Mapping[str, torch.Tensor], *, calls: int = CALLS, backward: bool = True
) -> Behaviour:
    """What ``call`` does, repeatedly; ``tensors`` are the parameters and buffers it goes by, without gradients."""
    done = Behaviour()
    with seeded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a training tells them, once
        for _ in range(calls):
            result = call()
            if backward:
                _backward(result)
            done.outputs.append(mapped(result, _detached))
            done.draws.append(_generators())
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            if tensor.grad is not None:
                done.gradients[name], tensor.grad = tensor.grad, None
        else:
            done.buffers[name] = tensor.detach().clone()
    return done


def difference(found: Behaviour, wanted: Behaviour) -> str | None:
    """In what ``found`` differs from ``wanted``, in words; None if in nothing."""
    for call, (one, other) in enumerate(zip(found.outputs, wanted.outputs, strict=True)):
        again = "" if call == 0 else " in a second call"
        if _outline(one) != _outline(other):
            return f"it returns something else{again}"
        pairs = list(zip(_tensors(one), _tensors(other), strict=True))
        if any(a.dtype != b.dtype or a.shape != b.shape for a, b in pairs):
            return f"it returns another type or shape{again}"
        if any(not _close(a, b, 0.0) for a, b in pairs):
            return f"it returns other numbers{again}"
    if found.draws != wanted.draws:
        return "it draws other random numbers"
    largest = max((float(one.abs().max()) for one in wanted.gradients.values() if one.numel()), default=0.0)
    for name in sorted(wanted.gradients.keys() | found.gradients.keys()):
        if not _same_gradient(found.gradients.get(name), wanted.gradients.get(name), largest):
            return f"the gradient of {name} is another"
    for name, there in wanted.buffers.items():
        here = found.buffers.get(name)
        if here is not None and (here.shape != there.shape or not _close(here, there, 0.0)):
            return f"the buffer {name} is another"
    return None


def _same_gradient(found: torch.Tensor | None, wanted: torch.Tensor | None, largest: float) -> bool:
    """Whether two gradients agree; none is as good as zeros."""
    if found is None or wanted is None:
        some = found if wanted is None else wanted
        return some is None or not bool(some.any())
    return _close(found, wanted, largest)


@contextmanager
def seeded() -> Iterator[None]:
    """Random numbers that are the same each time, and those to come as they would have been."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - as users' models draw
    try:
        torch.default_generator.manual_seed(_SEED)
        np.random.seed(_SEED)  # noqa: NPY002
        random.seed(_SEED)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def model_behaviour(
    model: nn.Module, inputs: Inputs, *, training: bool = True, count: bool = False
) -> tuple[Behaviour, int]:
    """What a copy of the model does; and, if they are to be counted, the FLOPs of its convolutions in one call."""
    trial = copied(model, share_parameters=True)
    set_mode(trial, training=training)
    counter = _Convolutions()
    first = [count]

    def call() -> Any:
        args, kwargs = inputs.rebuilt([one.clone() for one in inputs.tensors])
        if first.pop() if first else False:
            with counter:
                return trial(*args, **kwargs)
        return trial(*args, **kwargs)

    with gradients_kept(trial), torch.set_grad_enabled(training):
        done = behaviour(call, tensors_of(trial), calls=CALLS if training else 1, backward=training)
    return done, counter.flops


class _Convolutions(TorchDispatchMode):
    """Counts the FLOPs of all convolutions that torch runs, two per multiply-add."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            x, w, *_ = args
            self.flops += conv_flop_count(list(x.shape), list(w.shape), list(result.shape), transposed=args[6])
        return result


def reason_of(error: BaseException) -> str:
    """Why a model could not be run, short enough for a line."""
    text = first_line(error)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


_LONGEST = 120


def _backward(result: Any) -> None:
    """The gradient of a number that every output takes part in, each of its elements with another weight."""
    generator = torch.Generator().manual_seed(_SEED)
    terms = []
    for one in _tensors(result):
        if one.requires_grad and one.is_floating_point():
            weights = torch.randn(one.shape, generator=generator, dtype=torch.float32).to(one.dtype)
            terms.append((one * weights).sum())
    if terms:
        torch.autograd.backward(terms)


def _generators() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), (kind, np.asarray(keys).tobytes(), *rest), random.getstate()


def _detached(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _tensors(structure: Any) -> list[torch.Tensor]:
    return [one for one in leaves(structure) if isinstance(one, torch.Tensor)]


def _outline(structure: Any) -> Any:
    """What a structure is but for the numbers in its tensors."""
    if is_dataclass(structure) and not isinstance(structure, type):
        return type(structure), _outline(list(vars(structure).values()))
    if isinstance(structure, dict):
        return type(structure), [(key, _outline(one)) for key, one in structure.items()]
    if isinstance(structure, tuple | list):
        return type(structure), [_outline(one) for one in structure]
    return torch.Tensor if isinstance(structure, torch.Tensor) else structure


def _close(found: torch.Tensor, wanted: torch.Tensor, largest: float) -> bool:
    if not wanted.numel():
        return True
    if not wanted.is_floating_point() and not wanted.is_complex():
        return bool((found == wanted).all())
    if torch.equal(found, wanted):
        return True
    tolerance = _TOLERANCES.get(wanted.dtype, _ROUGH)
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    here, there = found.detach().to(wide), wanted.detach().to(wide)
    unlike = ~torch.isfinite(there)
    if bool(unlike.any()) or not bool(torch.isfinite(here).all()):
        return bool((torch.isnan(here) == torch.isnan(there)).all()) and bool(
            torch.equal(here.nan_to_num(0, 0, 0), there.nan_to_num(0, 0, 0))
        )
    scale = max(float(there.abs().max()), _FLOORS.get(wanted.dtype, _FLOOR) * largest, 1e-30)
    return float((here - there).abs().max()) <= tolerance * scale


@dataclass
class Facts:
    """What the run of captured calls tells of them."""

    differentiable: set[str] = field(default_factory=set)
    """Calls whose result needs a gradient."""
    drawing: set[str] = field(default_factory=set)
    """Calls that drew of torch's random numbers."""
    _state: torch.Tensor | None = None

    def begin(self) -> None:
        """Before the first of the calls."""
        self._state = torch.get_rng_state()

    def note(self, node: Node, result: Any) -> None:
        """Take note of the result of a call."""
        state = torch.get_rng_state()
        if self._state is not None and not torch.equal(state, self._state):
            self.drawing.add(node.name)
            self._state = state
        if any(isinstance(one, torch.Tensor) and one.requires_grad for one in leaves(result)):
            self.differentiable.add(node.name)
