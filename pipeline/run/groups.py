"""What an optimiser is given: the trained tensors of a model and of its loss, in groups where the user wants some.

Groups are worked out on the model that the user gave, and travel as the names of its parameters: each rank then looks
up what of them lives with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.errors import InputError, first_line

ParameterGroups = Callable[[nn.Module], Iterable[Any]]
"""Makes parameter groups of a model, as one would give them to an optimiser of that model."""

_COMPILED = "_orig_mod."
"""What ``torch.compile`` puts into the names of what it wraps."""


@dataclass(frozen=True, kw_only=True)
class NamedGroup:
    """Parameters that an optimiser treats alike, by name."""

    model: tuple[str, ...]
    """Those of the model; one that several modules share, under all its names."""
    loss: tuple[str, ...]
    """Those of the loss."""
    options: Mapping[str, Any]
    """The group's learning rate and the like."""


def loss_parameters(loss: object) -> dict[str, nn.Parameter]:
    """The trained weights of a loss of its own, by name; none of a function."""
    if not isinstance(loss, nn.Module):
        return {}
    return {name: one for name, one in loss.named_parameters() if one.requires_grad}


def check_loss(model: nn.Module, loss: object) -> None:
    """Raise ``InputError`` where the loss trains a tensor that is the model's, too."""
    names = {id(one): name for name, one in model.named_parameters()}
    for own, one in loss_parameters(loss).items():
        if id(one) in names:
            raise InputError(
                f"the loss has the model's '{names[id(one)]}' as its own '{own}': let the model return what the loss "
                "needs of it"
            )


def named_groups(select: ParameterGroups | None, model: nn.Module, loss: object) -> tuple[NamedGroup, ...] | None:
    """The groups that ``select`` makes of the model's parameters, and of the loss's, by name; None without ``select``.

    Raises ``InputError`` where it fails, or names a tensor that neither has.
    """
    if select is None:
        return None
    of_model: dict[int, list[str]] = {}
    for name, one in model.named_parameters(remove_duplicate=False):
        of_model.setdefault(id(one), []).append(name.replace(_COMPILED, ""))
    of_loss = {id(one): name for name, one in loss.named_parameters()} if isinstance(loss, nn.Module) else {}
    found = []
    for group in _as_groups(select, model):
        tensors = group["params"]
        unknown = next((one for one in tensors if id(one) not in of_model and id(one) not in of_loss), None)
        if unknown is not None:
            shape = tuple(getattr(unknown, "shape", ()))
            raise InputError(f"a parameter group names a tensor of shape {shape} that the model lacks")
        options = {name: value for name, value in group.items() if name != "params"}
        found.append(
            NamedGroup(
                model=tuple(name for one in tensors for name in of_model.get(id(one), [])),
                loss=tuple(of_loss[id(one)] for one in tensors if id(one) in of_loss),
                options=options,
            )
        )
    return tuple(found)


def _as_groups(select: ParameterGroups, model: nn.Module) -> list[dict[str, Any]]:
    """What an optimiser takes as parameters, groups or tensors with or without their names, as groups of tensors."""
    try:
        given = list(select(model))
        groups: list[dict[str, Any]] = [dict(one) for one in given if isinstance(one, Mapping)]
        for group in groups:
            group["params"] = _tensors(group["params"])
    except Exception as error:
        raise InputError(f"parameter_groups gives no parameter groups: {first_line(error)}") from error
    if not groups:
        groups = [{"params": _tensors(given)}]
    elif len(groups) < len(given):
        raise InputError("parameter_groups gives tensors beside groups: put them in a group of their own")
    return groups


def _tensors(given: Any) -> list[Any]:
    if isinstance(given, torch.Tensor):
        return [given]
    return [one[1] if isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) else one for one in given]


def grouped(
    groups: Sequence[NamedGroup] | None,
    trained: Sequence[torch.Tensor],
    home: Mapping[str, torch.Tensor],
    loss: Mapping[str, torch.Tensor],
) -> list[Any]:
    """What to give an optimiser of one rank.

    ``trained`` are the tensors of the model that the rank updates, ``home`` has them by all their names, and ``loss``
    those of the loss that it updates. Groups of which nothing is here stay, empty.
    """
    if groups is None:
        return [*trained, *loss.values()]
    mine = {id(tensor) for tensor in trained}
    found = []
    for group in groups:
        here = {id(home[name]): home[name] for name in group.model if name in home and id(home[name]) in mine}
        of_loss = [loss[name] for name in group.loss if name in loss]
        found.append({**group.options, "params": [*here.values(), *of_loss]})
    return found
