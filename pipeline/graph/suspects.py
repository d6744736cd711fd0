"""Which submodules cannot be captured, or do something else when they are: the smallest ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from pipeline.graph import check
from pipeline.graph.capture import Uncapturable, exported
from pipeline.graph.check import behaviour, difference, reason_of
from pipeline.graph.copies import Inputs, copied, gradients_kept, set_mode, tensors_of
from pipeline.graph.nodes import Value, filled, mapped


@dataclass
class _Called:
    """What a submodule was called with first."""

    tensors: list[torch.Tensor]
    needs_gradient: list[bool]
    arguments: Any
    """Its arguments and keyword arguments, with positions for the tensors."""

    def rebuilt(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these tensors in their places."""
        args, kwargs = filled(self.arguments, {str(place): one for place, one in enumerate(tensors)})
        return args, kwargs


def suspects(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """The smallest submodules of ``model`` that are to blame, with the reasons; nothing if none is by itself."""
    trial = copied(model, share_parameters=True)
    set_mode(trial, training=True)
    first = _Called(inputs.tensors, [False] * len(inputs.tensors), None)

    def run(called: nn.Module) -> None:
        args, kwargs = inputs.rebuilt([one.clone() for one in first.tensors])
        called(*args, **kwargs)

    return _Search().within("", trial, run)


class _Search:
    """Remembers what it found of submodules that are alike."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def within(self, name: str, module: nn.Module, run: Any) -> dict[str, str]:
        """The culprits among the parts of ``module``, which ``run`` calls."""
        found: dict[str, str] = {}
        for part, (child, called) in _calls(name, module, run).items():
            reason = self._reason(child, called)
            if not reason:
                continue

            def again(one: nn.Module, called: _Called = called) -> None:
                args, kwargs = called.rebuilt(_given(called))
                one(*args, **kwargs)

            found.update(self.within(part, child, again) or {part: reason})
        return found

    def _reason(self, module: nn.Module, called: _Called) -> str:
        """Why a submodule is to blame; nothing if it is not."""
        shapes = [(tuple(one.shape), one.dtype) for one in called.tensors]
        key = f"{type(module).__module__} {module!r} {shapes} {called.needs_gradient} {called.arguments!r}"
        if key not in self._known:
            self._known[key] = _difference(module, called) or ""
        return self._known[key]


def _calls(name: str, module: nn.Module, run: Any) -> dict[str, tuple[nn.Module, _Called]]:
    """The parts that a module calls, as deep as the first that is called, with what they were first called with."""
    found: dict[str, tuple[nn.Module, _Called]] = {}
    trial = copied(module, share_parameters=True)
    parts = {part: one for part, one in trial.named_modules(prefix=name) if one is not trial}
    depth = [0]
    handles = []

    def before(part: str) -> Any:
        def hook(child: nn.Module, args: Any, kwargs: Any) -> None:
            if not depth[0] and part not in found:
                found[part] = (child, _called(args, kwargs))
            depth[0] += 1

        return hook

    def after(*_: Any) -> None:
        depth[0] -= 1

    for part, child in parts.items():
        handles.append(child.register_forward_pre_hook(before(part), with_kwargs=True, prepend=True))
        handles.append(child.register_forward_hook(after, always_call=True))
    try:
        with check.seeded(), gradients_kept(trial):
            run(trial)
    except Exception:  # noqa: BLE001 - what was called until then is known
        pass
    finally:
        for handle in handles:
            handle.remove()
    originals = dict(module.named_modules(prefix=name))
    return {part: (originals[part], called) for part, (_, called) in found.items() if part in originals}


def _called(args: Any, kwargs: Any) -> _Called:
    tensors: list[torch.Tensor] = []

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        tensors.append(leaf)
        return Value(str(len(tensors) - 1))

    arguments = mapped((args, dict(kwargs)), one)
    return _Called([one.detach().clone() for one in tensors], [one.requires_grad for one in tensors], arguments)


def _given(called: _Called) -> list[torch.Tensor]:
    """The tensors of a call, with gradients where they had some."""
    return [
        one.clone().requires_grad_(needs) if one.is_floating_point() else one
        for one, needs in zip(called.tensors, called.needs_gradient, strict=True)
    ]


def _difference(module: nn.Module, called: _Called) -> str | None:
    """In what a submodule's own program differs from it; None if in nothing."""
    try:
        wanted = _behaviour(copied(module, share_parameters=True), called)
    except Exception as error:  # noqa: BLE001 - whatever its code raises
        return reason_of(error)
    trial = copied(module, share_parameters=True)
    dims = [{0: Dim.AUTO} if one.dim() and one.shape[0] > 1 else {} for one in called.tensors]
    try:
        with check.seeded(), gradients_kept(trial):
            program, returned = exported(trial, called.tensors, called.rebuilt, dims)
    except Uncapturable as error:
        return error.reason
    runnable = program.module(check_guards=False)
    given: list[list[torch.Tensor]] = []

    def call() -> Any:
        tensors = _given(called)
        given.append(tensors)
        results = runnable(*[one.clone() for one in tensors])
        return filled(returned, {str(place): one for place, one in enumerate(results)})

    names = {id(one): name for name, one in tensors_of(trial).items()}
    tensors = {names[id(one)]: one for one in program.state_dict.values() if id(one) in names}
    try:
        with gradients_kept(trial):
            found = behaviour(call, tensors)
    except Exception as error:  # noqa: BLE001 - whatever its program raises
        return reason_of(error)
    _with_inputs(found, given)
    return difference(found, wanted)


def _behaviour(module: nn.Module, called: _Called) -> check.Behaviour:
    given: list[list[torch.Tensor]] = []

    def call() -> Any:
        tensors = _given(called)
        given.append(tensors)
        args, kwargs = called.rebuilt([one.clone() for one in tensors])
        return module(*args, **kwargs)

    with gradients_kept(module):
        done = behaviour(call, tensors_of(module))
    _with_inputs(done, given)
    return done


def _with_inputs(done: check.Behaviour, given: Sequence[Sequence[torch.Tensor]]) -> None:
    """Add the gradients of what was given."""
    for call, tensors in enumerate(given):
        for place, one in enumerate(tensors):
            if one.grad is not None:
                done.gradients[f"input {place} of call {call}"] = one.grad
