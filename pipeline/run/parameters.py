"""The parameters and buffers of one rank: where they live, where they work, and the way between."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from pipeline.graph.operations import Graph, Operation
from pipeline.plan.instructions import Exchange, Placed
from pipeline.plan.layouts import master, replicated
from pipeline.plan.plan import ParameterPlan, Plan, parameters_of
from pipeline.plan.program import parameter_spec
from pipeline.run.memory_format import arrange, empty, flat, shaped_as
from pipeline.run.parts import Parts
from pipeline.run.transport import Transport


class Parameters:
    """One rank's shards of the parameters.

    On the master an operation that is not split uses the model's own tensors. A split one, and any on another rank,
    uses tensors of the size of the shard; ``load`` fills them from the master's model and ``gather`` brings them back.
    """

    def __init__(self, parts: Parts | None, graph: Graph, plan: Plan, transport: Transport) -> None:
        """``parts`` of the model are on the master only."""
        self._graph, self._plan, self._transport = graph, plan, transport
        self._rank, self._device = transport.rank, transport.device
        self._plans = {one.parameter.name: one for _, one in parameters_of(graph, plan)}
        self.work: dict[str, torch.Tensor] = {}
        """By name, the tensors that the local operations use."""
        self._originals: set[str] = set()
        """The names of those that the master's own submodules use as they are."""
        self._gradients: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor | None] = {}
        """By bucket, this rank's gradients, of which its part has been summed over ranks."""
        self._dtype = graph.dtype
        self._original: Callable[[str], torch.Tensor] = _not_here
        """Gives the master's own tensor of a name."""
        if parts is not None:
            self._original = parts.current()
            parts.to(self._device)
            arrange(parts.tensors.values(), channels_last=plan.channels_last)
        for operation in graph.operations:
            self._make_local(operation)
        self.home = {name: tensor for name, one in self._plans.items() if (tensor := self._home(one)) is not None}
        """By name, the tensors that this rank keeps between steps; the optimiser updates the trained ones."""

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained parameters (or shards) whose home is this rank, in the order of the network."""
        found = {
            id(tensor): tensor  # once, even where it has several names
            for name, tensor in self.home.items()
            if self._plans[name].parameter.trained and isinstance(tensor, nn.Parameter)
        }
        return list(found.values())

    def load(self) -> None:
        """Move every parameter and buffer from the master's model to its home."""
        for name, one in self._plans.items():
            self._carry(name, one, outward=True)

    def gather(self) -> dict[str, torch.Tensor]:
        """Bring every parameter and buffer back into the master's model; there, all of them by name, else nothing."""
        for name, one in self._plans.items():
            self._carry(name, one, outward=False)
        return {name: self._original(name) for name in self._plans} if self._rank == 0 else {}

    def clear_gradients(self) -> None:
        """Forget all gradients before a step."""
        for tensor in (*self.work.values(), *self.home.values()):
            tensor.grad = None

    @property
    def counted(self) -> list[torch.Tensor]:
        """The trained tensors of this rank, without copies of what a lower rank counts already."""
        found = {
            id(tensor): tensor
            for name, tensor in self.home.items()
            if self._plans[name].parameter.trained
            and (self._plans[name].home.kind != "R" or self._plans[name].home.holders[0] == self._rank)
        }
        return list(found.values())

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

    def sum_gradients(self, exchange: Exchange, names: Sequence[str]) -> Callable[[], None]:
        """Begin one of the exchanges that sum the gradients of ``names`` over ranks; call the result to end it.

        Where each rank sums a part for all, it does so in place. Where every rank sums all, it must not begin with its
        own, or they would not round alike.
        """
        bucket = exchange.source.name
        first, last = exchange.source.layout.kind == "P", exchange.target.layout.kind == "R"
        whole = self._joined(names) if first else self._sums.pop(bucket)
        if not last:
            self._sums[bucket] = whole
        source = self._part(exchange, exchange.source, whole)
        total = torch.empty_like(whole) if first and last and whole is not None else whole
        wait = self._transport.start(exchange, source, self._part(exchange, exchange.target, total))

        def finish() -> None:
            wait()
            if not last or total is None:
                return
            start = 0
            for name in names:
                tensor = self.work[name]
                numbers = total[start : start + tensor.numel()]
                tensor.grad = shaped_as(numbers, tensor, channels_last=self._plan.channels_last).to(tensor.dtype)
                start += tensor.numel()

        return finish

    def _part(self, exchange: Exchange, placed: Placed, whole: torch.Tensor | None) -> torch.Tensor | None:
        """This rank's part of a bucket in a layout, as a view; None where it has none."""
        box = exchange.spec.boxes(placed.layout)[self._rank]
        if whole is None or not box:
            return None
        everything = exchange.spec.boxes(replicated((1,) * self._plan.ranks))[self._rank]
        return whole[exchange.spec.slices(everything, box)]

    def _joined(self, names: Sequence[str]) -> torch.Tensor | None:
        """This rank's gradients of ``names`` one after the other, zeros where it has none; None if it has no copy."""
        if names[0] not in self.work:
            return None
        tensors = [self.work[name] for name in names]
        gradients = (torch.zeros_like(one) if one.grad is None else one.grad for one in tensors)
        last = self._plan.channels_last
        return torch.cat([flat(one, channels_last=last).to(self._dtype) for one in gradients])

    def gather_gradients(self) -> dict[str, torch.Tensor]:
        """The gradients of the last step by parameter, zeros where there is none; on the master, else nothing."""
        found = {}
        for name, one in self._plans.items():
            if not one.parameter.trained:
                continue
            home = self.home.get(name)
            mine = None if home is None else (torch.zeros_like(home) if home.grad is None else home.grad)
            whole = torch.empty_like(self._original(name), device=self._device) if self._rank == 0 else None
            self._move(Placed(name, one.home), mine, Placed(name, master(self._plan.ranks)), whole, one)
            if whole is not None:
                found[name] = whole.detach().cpu().contiguous()
        return found

    def _carry(self, name: str, one: ParameterPlan, *, outward: bool) -> None:
        """Move one parameter between the master's model and its home."""
        whole, home = self._original(name) if self._rank == 0 else None, self.home.get(name)
        if self._rank == 0 and name in self._originals:
            home = whole  # also where its submodule has put another tensor in its place
        if whole is not None and whole is home:
            return  # the master's own module is the home already, and no other rank has a part
        ends = [(Placed(name, master(self._plan.ranks)), whole), (Placed(name, one.home), home)]
        (source, start), (target, end) = ends if outward else reversed(ends)
        self._move(source, start, target, end, one)

    def _move(
        self,
        source: Placed,
        start: torch.Tensor | None,
        target: Placed,
        end: torch.Tensor | None,
        one: ParameterPlan,
    ) -> None:
        exchange = Exchange(
            name=f"{source.name} {source.layout.kind}→{target.layout.kind}",
            direction="forward",
            source=source,
            target=target,
            spec=parameter_spec(one),
            moves="parameter",
            once=True,
        )
        self._transport.exchange(exchange, start, end)

    def _home(self, one: ParameterPlan) -> torch.Tensor | None:
        if one.home == one.work:
            return self.work.get(one.parameter.name)
        return self._original(one.parameter.name) if self._rank == 0 else None

    def _make_local(self, operation: Operation) -> None:
        planned = self._plan[operation.name]
        if self._rank not in planned.ranks:
            return
        unsplit = planned.input.kind == "M" and planned.output.kind == "M"
        within = operation.main.submodule is not None
        for parameter in operation.parameters:
            if parameter.name in self.work:
                continue
            if unsplit and within:
                self.work[parameter.name] = self._original(parameter.name)
                self._originals.add(parameter.name)
                continue
            original = self._original(parameter.name) if unsplit else None
            if original is not None and original.device == self._device:
                self.work[parameter.name] = original
                continue
            shard = self._shard(self._plans[parameter.name])
            if shard is not None:
                self.work[parameter.name] = shard

    def _shard(self, one: ParameterPlan) -> torch.Tensor | None:
        """An empty tensor for this rank's part; None where it has none."""
        spec = parameter_spec(one)
        box = spec.boxes(one.work)[self._rank]
        if not box:
            return None
        parameter = one.parameter
        tensor = empty(
            spec.local_shape(box),
            channels_last=self._plan.channels_last,
            dtype=parameter.dtype,
            device=self._device,
        )
        return tensor if parameter.buffer else nn.Parameter(tensor, requires_grad=parameter.trained)


def _not_here(name: str) -> torch.Tensor:
    raise AssertionError(f"{name} is asked for where the model is not")
