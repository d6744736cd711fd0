"""The parameters and buffers of one rank: where they live, where they work, and the way between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import fx, nn

from pipeline.graph.effects import Effect
from pipeline.graph.trace import Graph, Operation, Parameter, model_dtype
from pipeline.plan.instructions import Exchange, Placed
from pipeline.plan.layouts import Layout, master, replicated
from pipeline.plan.plan import ParameterPlan, Plan, parameters_of
from pipeline.plan.program import parameter_spec
from pipeline.run.memory_format import arrange_module, empty, flat, shaped_as
from pipeline.run.transport import Transport


class Parameters:
    """One rank's modules with its shards of the parameters.

    On the master an operation that is not split uses the model's own submodule. A split one, and any on another rank,
    uses a copy of the submodule whose parameters have the size of the shard; ``load`` fills them from the master's
    model and ``gather`` brings them back.
    """

    def __init__(self, model: fx.GraphModule, graph: Graph, plan: Plan, transport: Transport) -> None:
        """``model`` is what tracing made of it."""
        self._model, self._graph, self._plan, self._transport = model, graph, plan, transport
        self._rank, self._device = transport.rank, transport.device
        self._plans = {one.parameter.name: one for _, one in parameters_of(graph, plan)}
        self.modules: dict[str, tuple[str, nn.Module]] = {}
        """By operation, the name of its submodule and what does its work here."""
        self.work: dict[str, torch.Tensor] = {}
        """By name, the tensors that the local operations use."""
        self._originals: set[str] = set()
        """The names of those that the master's own modules use as they are."""
        self._gradients: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor | None] = {}
        """By bucket, this rank's gradients, of which its part has been summed over ranks."""
        self._dtype = model_dtype(model)
        arrange_module(model, channels_last=plan.channels_last)
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

    def gather(self) -> None:
        """Bring every parameter and buffer back into the master's model."""
        for name, one in self._plans.items():
            self._carry(name, one, outward=False)

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
            home = whole  # also where its module has put another tensor in its place
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
        unsplit = planned.input.kind == "M" and planned.output.kind == "M"
        if operation.module is None:
            for parameter in operation.parameters:
                self.work[parameter.name] = self._direct(parameter, unsplit=unsplit)
            return
        module = self._model.get_submodule(operation.module)
        if getattr(module, "inplace", False):
            # A segment's input is a leaf of its own, which must not be written to.
            setattr(module, "inplace", False)  # noqa: B010 - for torch's types a module has only tensors
        if unsplit:
            self.modules[operation.name] = operation.module, module.to(self._device)
            for parameter in operation.parameters:
                if not parameter.name.startswith(f"{operation.module}."):  # what the module is given
                    self.work[parameter.name] = self._direct(parameter, unsplit=True)
                    continue
                self.work[parameter.name] = self._original(parameter.name)
                self._originals.add(parameter.name)
            return
        same = next((one for name, one in self.modules.values() if name == operation.module), None)
        if same is not None and operation.parameters:
            self.modules[operation.name] = operation.module, same
            return
        local = copy.deepcopy(module).to("meta")
        for parameter in operation.parameters:
            if parameter.name.startswith(f"{operation.module}."):
                self._replace(local, operation, self._plans[parameter.name])
            else:  # what the module is given
                self.work[parameter.name] = self._direct(parameter, unsplit=False)
        _fit_attributes(local, operation, planned.input.shares[self._rank], planned.output)
        self.modules[operation.name] = operation.module, local

    def _direct(self, parameter: Parameter, *, unsplit: bool) -> torch.Tensor:
        """A parameter that the model's own ``forward`` reads."""
        original = self._original(parameter.name)
        if unsplit and original.device == self._device:
            return original
        return self._shard(self._plans[parameter.name], original)

    def _shard(self, one: ParameterPlan, like: torch.Tensor) -> torch.Tensor:
        """An empty tensor for this rank's part."""
        spec = parameter_spec(one)
        shape = spec.local_shape(spec.boxes(one.work)[self._rank])
        tensor = empty(shape, channels_last=self._plan.channels_last, dtype=like.dtype, device=self._device)
        return tensor if one.parameter.buffer else nn.Parameter(tensor, requires_grad=one.parameter.trained)

    def _replace(self, local: nn.Module, operation: Operation, one: ParameterPlan) -> None:
        """Give ``local`` an empty tensor of the shard's shape, or None where this rank has no part of it."""
        name = one.parameter.name
        owner, _, leaf = name.removeprefix(f"{operation.module}.").rpartition(".")
        submodule = local.get_submodule(owner)
        like = getattr(submodule, leaf)
        if not parameter_spec(one).boxes(one.work)[self._rank]:
            setattr(submodule, leaf, None)
            return
        tensor = self._shard(one, like)
        setattr(submodule, leaf, tensor)
        self.work[name] = tensor


def _fit_attributes(local: nn.Module, operation: Operation, input_share: int, output: Layout) -> None:
    """Tell a module that has some of the channels how many there are, where it goes by that."""
    if output.kind != "K":
        return
    if operation.effect is Effect.GROUPED and isinstance(local, nn.modules.conv._ConvNd):
        local.groups = input_share // operation.input_unit
    if isinstance(local, nn.GroupNorm):
        local.num_groups = input_share // operation.unit
    if isinstance(local, nn.modules.instancenorm._InstanceNorm):
        local.num_features = input_share
