"""What of a model goes to the master of a run: its tensors, and the submodules that run as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cloudpickle
import torch
from torch import nn

from pipeline.errors import InputError, first_line
from pipeline.graph.copies import tensors_of
from pipeline.graph.operations import Graph


@dataclass(frozen=True)
class Parts:
    """The tensors of a graph, by name, and the submodules that it calls, by name; a module has its tensors itself."""

    tensors: dict[str, torch.Tensor]
    modules: dict[str, nn.Module]

    def to(self, device: torch.device) -> None:
        """Move the submodules to a device, and tensors with them."""
        for module in self.modules.values():
            module.to(device)

    def current(self) -> Callable[[str], torch.Tensor]:
        """What gives a tensor by its name, also where a submodule has put another in its place since."""
        places: dict[str, tuple[nn.Module, str]] = {}
        names = {id(tensor): name for name, tensor in self.tensors.items()}
        for module in self.modules.values():
            for owner in module.modules():
                for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                    if id(tensor) in names:
                        places[names[id(tensor)]] = (owner, leaf)

        def tensor_of(name: str) -> torch.Tensor:
            if name in places:
                owner, leaf = places[name]
                found: torch.Tensor = getattr(owner, leaf)
                return found
            return self.tensors[name]

        return tensor_of


def parts_of(model: nn.Module, graph: Graph) -> Parts:
    """The parts of ``model`` that its ``graph`` needs, not copied.

    Raises ``InputError`` for a submodule that has to run as it is and cannot be sent to another process.
    """
    known = tensors_of(model)
    names = {one.name for operation in graph.operations for one in operation.parameters}
    modules = {name: model.get_submodule(name) for name in graph.submodules}
    for name, module in modules.items():
        check_portable(module, f"{name or 'the model'} ({type(module).__name__}) has to run as it is, and")
    return Parts({name: tensor for name, tensor in known.items() if name in names}, modules)


def check_portable(module: nn.Module, which: str) -> None:
    """Raise ``InputError`` where nothing can carry a module to another process; ``which`` begins the sentence."""
    try:
        cloudpickle.dumps(module)
    except Exception as error:
        raise InputError(f"{which} cannot be sent to a device: {first_line(error)}") from error


def made_up(graph: Graph, modules: dict[str, nn.Module], device: str = "cpu") -> Parts:
    """Uninitialised tensors in the place of a model's, where only times matter; ``modules`` have theirs already."""
    tensors: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        for own, tensor in tensors_of(module).items():
            tensors[f"{name}.{own}" if name else own] = tensor
    for operation in graph.operations:
        for one in operation.parameters:
            if one.name not in tensors:
                made = torch.empty(one.shape, dtype=one.dtype, device=device)
                tensors[one.name] = made if one.buffer else nn.Parameter(made, requires_grad=one.trained)
    return Parts(tensors, modules)
