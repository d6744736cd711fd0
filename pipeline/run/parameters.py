"""The parameters and buffers of one rank: where they live, where they work, and the way between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import fx, nn

from pipeline.graph.trace import Graph, Operation
from pipeline.plan.layouts import Layout, master
from pipeline.plan.plan import ParameterPlan, Plan, parameters_of
from pipeline.plan.program import Exchange, Placed, parameter_spec
from pipeline.run.transport import Transport


class Parameters:
    """One rank's modules with its shards of the parameters.

    On the master an operation that is not split uses the model's own submodule. A split one, and any on another rank,
    uses a copy of the submodule whose parameters have the size of the shard; ``load`` fills them from the master's
    model and ``gather`` brings them back.
    """

    def __init__(self, model: fx.GraphModule, graph: Graph, plan: Plan, transport: Transport) -> None:
        self._model, self._graph, self._plan, self._transport = model, graph, plan, transport
        self._rank, self._device = transport.rank, transport.device
        self._plans = {one.parameter.name: one for _, one in parameters_of(graph, plan)}
        self.modules: dict[str, nn.Module] = {}
        self.work: dict[str, torch.Tensor] = {}
        """By name, the tensors that the local operations use."""
        self._gradients: dict[str, torch.Tensor] = {}
        for module in model.modules():
            if hasattr(module, "inplace"):
                # A segment's input is a leaf of its own, which must not be written to.
                setattr(module, "inplace", False)  # noqa: B010 - for torch's types a module has only tensors
        for operation in graph.operations:
            self._make_local(operation)
        self.home = {name: tensor for name, one in self._plans.items() if (tensor := self._home(one)) is not None}
        """By name, the tensors that this rank keeps between steps; the optimiser updates the trained ones."""

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained parameters (or shards) whose home is this rank, in the order of the network."""
        return [
            tensor
            for name, tensor in self.home.items()
            if self._plans[name].parameter.trained and isinstance(tensor, nn.Parameter)
        ]

    def load(self) -> None:
        """Move every parameter and buffer from the master's model to its home."""
        for name, one in self._plans.items():
            self._carry(name, one, outward=True)

    def gather(self) -> None:
        """Bring every parameter and buffer back into the master's model."""
        for name, one in self._plans.items():
            self._carry(name, one, outward=False)

    def clear_gradients(self) -> None:
        """Forget all gradients before a step."""
        for tensor in (*self.work.values(), *self.home.values()):
            tensor.grad = None

    def trained_by(self, operations: Sequence[str]) -> list[torch.Tensor]:
        """The trained tensors that the local parts of ``operations`` use."""
        names = (one.name for name in operations for one in self._graph[name].parameters if one.trained)
        return [self.work[name] for name in names if name in self.work]

    def send_to_work(self, exchange: Exchange) -> Callable[[], None]:
        """Begin the exchange of a parameter from its home to the ranks that work with it; call the result to end it."""
        name = exchange.source.name
        return self._transport.start(exchange, self.home.get(name), self.work.get(name))

    def send_gradient_home(self, exchange: Exchange) -> Callable[[], None]:
        """Begin the exchange of a parameter's gradient to its home; call the result to end it."""
        name = exchange.source.name
        work, home = self.work.get(name), self.home.get(name)
        gradient = None
        if work is not None:
            gradient = torch.zeros_like(work) if work.grad is None else work.grad
        if home is not None:
            home.grad = self._gradients.setdefault(name, torch.empty_like(home))
        return self._transport.start(exchange, gradient, None if home is None else home.grad)

    def _carry(self, name: str, one: ParameterPlan, *, outward: bool) -> None:
        """Move one parameter between the master's model and its home."""
        whole, home = self._original(name) if self._rank == 0 else None, self.home.get(name)
        if whole is not None and whole is home:
            return  # the master's own module is the home already, and no other rank has a part
        ends = [(Placed(name, master(self._plan.ranks)), whole), (Placed(name, one.home), home)]
        (source, start), (target, end) = ends if outward else reversed(ends)
        exchange = Exchange(
            name=f"{name} {source.layout.kind}→{target.layout.kind}",
            direction="forward",
            source=source,
            target=target,
            spec=parameter_spec(one),
            parameter=True,
        )
        self._transport.exchange(exchange, start, end)

    def _original(self, name: str) -> torch.Tensor:
        """The master's own tensor of this name."""
        owner, _, leaf = name.rpartition(".")
        return getattr(self._model.get_submodule(owner), leaf)  # type: ignore[no-any-return]

    def _home(self, one: ParameterPlan) -> torch.Tensor | None:
        if one.home == one.work:
            return self.work.get(one.parameter.name)
        return self._original(one.parameter.name) if self._rank == 0 else None

    def _make_local(self, operation: Operation) -> None:
        planned = self._plan[operation.name]
        if self._rank not in planned.ranks:
            return
        unsplit = _is_master(planned.input) and _is_master(planned.output)
        if operation.module is None:
            for parameter in operation.parameters:
                self.work[parameter.name] = self._original(parameter.name)
            return
        if operation.module in self.modules:
            return
        module = self._model.get_submodule(operation.module)
        if unsplit:
            self.modules[operation.module] = module.to(self._device)
            for parameter in operation.parameters:
                self.work[parameter.name] = self._original(parameter.name)
            return
        local = copy.deepcopy(module).to("meta")
        for parameter in operation.parameters:
            self._replace(local, operation, self._plans[parameter.name])
        self.modules[operation.module] = local

    def _replace(self, local: nn.Module, operation: Operation, one: ParameterPlan) -> None:
        """Give ``local`` an empty tensor of the shard's shape, or None where this rank has no part of it."""
        name = one.parameter.name
        owner, _, leaf = name.removeprefix(f"{operation.module}.").rpartition(".")
        submodule = local.get_submodule(owner)
        like = getattr(submodule, leaf)
        box = parameter_spec(one).boxes(one.work)[self._rank]
        if not box:
            setattr(submodule, leaf, None)
            return
        shape = parameter_spec(one).local_shape(box)
        tensor: torch.Tensor = torch.empty(shape, dtype=like.dtype, device=self._device)
        if not one.parameter.buffer:
            tensor = nn.Parameter(tensor, requires_grad=one.parameter.trained)
        setattr(submodule, leaf, tensor)
        self.work[name] = tensor


def _is_master(layout: Layout) -> bool:
    return layout.kind == "M"
