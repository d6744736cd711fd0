"""Copies of a model to try things on, so that the user's own is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.errors import InputError, first_line


def model_dtype(model: nn.Module) -> torch.dtype:
    """The number type of a model: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())


def copied(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A copy with buffers and all other attributes of its own, and parameters of its own or the model's.

    Also of a model that keeps a computed weight, as weight norm and pruning do, which ``copy.deepcopy`` refuses.
    Raises ``InputError`` where Python cannot copy a part.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    if share_parameters:
        memo.update((id(parameter), parameter) for parameter in model.parameters())
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Give every parameter the gradient back that it had before."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Into the mode that a training has it in, or into evaluation.

    Parts of a model in training mode that are out of it are so on purpose, such as BatchNorm that is not to be trained,
    and stay so.
    """
    kept = [one for one in model.modules() if not one.training] if training and model.training else []
    model.train(training)
    for one in kept:
        one.training = False


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def names_of(model: nn.Module) -> dict[int, str]:
    """By ``id``, the first name of each parameter and buffer."""
    return {id(tensor): name for name, tensor in tensors_of(model).items()}


def take_over(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give parameters and buffers of ``model`` the values of ``tensors``, by name."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        held = getattr(module, leaf)
        if held.shape == tensor.shape:
            with torch.no_grad():
                held.copy_(tensor)
        else:  # a buffer may have grown
            setattr(module, leaf, tensor.to(held.device))


@dataclass(frozen=True)
class Inputs:
    """What a model is called with: tensors whose first axis is that of the images, by position and by keyword."""

    args: tuple[torch.Tensor, ...]
    kwargs: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """Of a batch's first part: a tensor, a tuple or list of tensors, or a dictionary of them."""
        if isinstance(batch, torch.Tensor):
            return cls((batch,), {})
        if isinstance(batch, dict):
            return cls((), dict(batch))
        return cls(tuple(batch), {})

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them in order."""
        return [*self.args, *self.kwargs.values()]

    @property
    def keys(self) -> list[int | str]:
        """Of each, its position or its keyword."""
        return [*range(len(self.args)), *self.kwargs]

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.tensors[0])

    def with_images(self, images: int) -> Inputs:
        """So many images, the same ones again where there are fewer."""

        def chosen(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[[index % len(tensor) for index in range(images)]].clone()

        return Inputs(tuple(chosen(one) for one in self.args), {name: chosen(one) for name, one in self.kwargs.items()})

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same on the CPU: floating-point tensors of that type, and a single one in any case."""
        images = len(self.args) == 1 and not self.kwargs

        def converted(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to("cpu", dtype if images or tensor.is_floating_point() else tensor.dtype)

        return Inputs(
            tuple(converted(one) for one in self.args), {name: converted(one) for name, one in self.kwargs.items()}
        )

    def rebuilt(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments of the same structure."""
        return tuple(tensors[: len(self.args)]), dict(zip(self.kwargs, tensors[len(self.args) :], strict=True))
