"""Networks of a user's own, named `package.module:factory`: found, called and checked before anything starts."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from pipeline._torchvision import make_importable
from pipeline.errors import InputError

if TYPE_CHECKING:
    from distributed import Client


_NAME = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*(?:\.[^\W\d]\w*)*)")
_CLASS_ARGUMENTS = ("num_classes", "classes")


def is_factory(name: str) -> bool:
    """Whether the name has the form `package.module:factory`."""
    return _NAME.fullmatch(name) is not None


def find_factory(name: str) -> Callable[..., Any]:
    """The callable of that name, its module imported from the current folder or from what is installed.

    Raises:
        InputError: The module cannot be imported, or has no such callable that needs no argument but the classes.
    """
    module_name, path = name.split(":")
    factory: Any = _module(name, module_name)
    for part in path.split("."):
        if not hasattr(factory, part):
            raise InputError(
                f"Network '{name}' does not exist: {module_name} has no '{path}'; give a function or class of it that "
                "returns a torch.nn.Module."
            )
        factory = getattr(factory, part)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise InputError(
            f"Network '{name}' is of type {type(factory).__name__}: give a function or class that returns a "
            "torch.nn.Module when it is called."
        )
    required = [
        parameter.name
        for parameter in _parameters(factory)
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in _CLASS_ARGUMENTS
    ]
    if required:
        raise InputError(
            f"Network '{name}' needs the argument {', '.join(required)}: give a function that needs none (num_classes "
            "or classes is passed where it is taken)."
        )
    found: Callable[..., Any] = factory
    return found


def channels(name: str, classes: int) -> int | None:
    """How many channels the first convolution of what that factory makes takes; None where it does not say.

    Raises:
        InputError: As `find_factory`, or the factory raises or returns no module.
    """
    convolutions = (one for one in _made(name, classes).modules() if isinstance(one, nn.modules.conv._ConvNd))
    first = next(convolutions, None)
    return None if first is None or not first.in_channels else first.in_channels


def build(name: str, classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Call the factory of that name, with the number of classes where it takes it.

    Raises:
        InputError: As `find_factory`; the factory raises or returns no module; or the images or classes do not fit.
    """
    model = _made(name, classes)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"Network '{name}' has no parameters to train.")
    _check_images(name, model.cpu(), classes, image_shape)
    return model.train()


def _made(name: str, classes: int) -> nn.Module:
    """What the factory of that name returns."""
    factory = find_factory(name)
    taken = [parameter.name for parameter in _parameters(factory) if parameter.name in _CLASS_ARGUMENTS]
    try:
        model = factory(**dict.fromkeys(taken, classes))
    except Exception as error:
        raise InputError(f"Network '{name}' cannot be built: {_reason(error)}.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"Network '{name}' returns {type(model).__name__} instead of a torch.nn.Module.")
    return model


def check_workers(client: Client, members: Sequence[Any], name: str) -> None:
    """Raise InputError unless every worker can import the module of the factory: the network travels by its name."""
    if not is_factory(name.strip()):
        return
    module, _, _ = name.strip().partition(":")
    found = client.run(_import_error, module, workers=[member.address for member in members])
    for member in members:
        if reason := found[member.address]:
            raise InputError(
                f"Network '{name}' cannot be used on worker {member.name}: {reason}; start the workers where the "
                f"module {module} can be imported, in its folder or with PYTHONPATH."
            )


def _import_error(module: str) -> str:
    """Runs on a worker: why the module cannot be imported, '' if it can."""
    make_importable()
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a module may raise anything, and the driver tells it
        return _reason(error)
    return ""


def _module(name: str, module_name: str) -> Any:
    folder = os.getcwd()  # noqa: PTH109 - as text, like the other entries
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)  # Workers of a local cluster start with the same path.
    make_importable()
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"Network '{name}': importing {module_name} fails: {_reason(error)}.") from error
        remedy = f"; write {name.replace('.py:', ':')}" if module_name.endswith(".py") else ""
        raise InputError(
            f"Network '{name}' does not exist: there is no module {error.name} in {folder} or among what is "
            f"installed{remedy}."
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(f"Network '{name}': importing {module_name} fails: {_reason(error)}.") from error


def _parameters(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):  # Written in C, without a signature.
        return []


def _check_images(name: str, model: nn.Module, classes: int, image_shape: tuple[int, int, int]) -> None:
    """Try two images on a copy: the meta device would be faster, but not every forward runs there.

    Lazy modules get their sizes by that, so they are tried themselves.
    """
    shape = "x".join(map(str, image_shape))
    try:
        tried = model if any(map(is_lazy, model.parameters())) else copy.deepcopy(model)
        with torch.no_grad():
            output = tried.eval()(torch.zeros(2, *image_shape, dtype=next(model.parameters()).dtype))
    except Exception as error:
        raise InputError(
            f"Network '{name}' cannot take images of shape {shape} (channels x height x width): {_reason(error)}."
        ) from error
    scores = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
    if scores is None or scores.dim() < 2 or scores.shape[0] != 2 or scores.shape[1] < classes:
        found = type(output).__name__ if scores is None else f"a tensor of shape {tuple(scores.shape)}"
        raise InputError(
            f"Network '{name}' gives {found} for two images, but the data have {classes} classes: it must give at "
            "least one score for each class; let the factory take num_classes."
        )


def _reason(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, without a full stop."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}".rstrip(": .")
