"""Models that went through ``torch.compile``, as they were before: it hides layers, and changes names of weights."""

from __future__ import annotations

import copy

from torch import nn


def without_compiler(model: nn.Module) -> nn.Module:
    """The model inside what ``torch.compile`` made of it, or of parts of it; those are taken out of a copy."""
    while (inner := _inner(model)) is not None:
        model = inner
    wrapped = [one for one in model.modules() if _inner(one) is not None]
    if not wrapped:
        return model
    # deepcopy takes from its memo what it would otherwise copy.
    memo: dict[int, nn.Module] = {}
    for one in reversed(wrapped):
        memo[id(one)] = copy.deepcopy(_inner(one), memo)  # type: ignore[assignment]
    return copy.deepcopy(model, memo)


def _inner(model: nn.Module) -> nn.Module | None:
    # By name: the class is in a part of torch that takes a second to load.
    return model._modules.get("_orig_mod") if type(model).__name__ == "OptimizedModule" else None
