"""Run a program on one rank: the local operations, the values in flight, and the explicit backward pass."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pipeline.cluster.gang import RankContext
from pipeline.data.batches import moved
from pipeline.graph.effects import Effect
from pipeline.graph.trace import Graph, model_dtype
from pipeline.graph.tracing import EVALUATION, modes, traced
from pipeline.graph.writes import NO_GRADIENT
from pipeline.links import Link
from pipeline.plan.instructions import LOSS, Compute, Exchange, Instruction, Placed, Step, may_go_on
from pipeline.plan.layouts import master
from pipeline.plan.plan import Plan
from pipeline.plan.program import Program, activation_spec, compile_inference, compile_program
from pipeline.run import batch_norm
from pipeline.run.clock import Clock
from pipeline.run.emulation import Throttle
from pipeline.run.memory_format import arrange_module, arranged, empty
from pipeline.run.noise import Masks
from pipeline.run.parameters import Parameters
from pipeline.run.recipe import Recipe, Turn, Updater
from pipeline.run.transport import Transport


class _Pending(NamedTuple):
    """An exchange that is under way."""

    place: int | None
    exchange: Exchange
    finish: Callable[[], None]


class Execution:
    """One rank's part of a plan.

    ``model`` is the real model on the master and a skeleton on the meta device elsewhere. Every rank must make the same
    calls in the same order, with the same batch sizes.
    """

    def __init__(
        self, context: RankContext, model: nn.Module, graph: Graph, plan: Plan, link: Link | None = None
    ) -> None:
        self.context, self.graph, self.plan, self.model = context, graph, plan, model
        self.transport = Transport(context, link=link, channels_last=plan.channels_last)
        self.throttle = Throttle(context.device)
        graph_module = traced(model)
        self._modes = {training: _modes_by_name(model, graph_module, training=training) for training in (True, False)}
        self._nodes = {node.name: node for node in graph_module.graph.nodes}
        self._returned = next(node for node in graph_module.graph.nodes if node.op == "output").args[0]
        self.parameters = Parameters(graph_module, graph, plan, self.transport)
        self.dtype = model_dtype(model)
        self.program = functools.lru_cache(maxsize=8)(functools.partial(compile_program, graph, plan))
        """The program for a batch size; the last batch of an epoch is often smaller."""
        self._places = functools.lru_cache(maxsize=8)(functools.partial(_places_of, self.program, plan.batch_size))
        self._inference = functools.lru_cache(maxsize=8)(functools.partial(compile_inference, graph, plan))
        self.values: dict[Placed, Any] = {}
        """The tensors in flight, each a leaf of its own whose gradient gathers in ``.grad``."""
        self._batch_size = 0
        self._is_training: bool | None = None
        self._weight = 1.0
        self._masks = Masks(graph, 0)
        self._attached: dict[int, list[Any]] = {}
        self._pending: list[_Pending] = []
        self._target: Any = None
        self._loss: torch.Tensor | None = None
        self._recipe: Recipe | None = None
        self._whole: nn.Module | None = None
        """On the master, the model to evaluate where the graph cannot do it."""
        self.updater: Updater | None = None

    def prepare(self, recipe: Recipe, seed: int) -> None:
        """Move the parameters to their homes and make an optimiser for those that live here."""
        self.parameters.load()
        self._masks = Masks(self.graph, seed)
        self._recipe = recipe.on(self.transport.device)
        self.updater = Updater(self._recipe, self.parameters, self.context)

    def train_step(
        self,
        batch_size: int,
        x_BCHW: torch.Tensor | None,
        target: Any,
        clock: Clock,
        turn: Turn,
    ) -> float | None:
        """One step of training on a batch of ``batch_size`` images; the master gives the batch and gets the loss."""
        program = self.program(batch_size)
        self.begin(batch_size, x_BCHW, training=True)
        self._weight = turn.weight
        if turn.first:
            self.parameters.clear_gradients()
        self._target = moved(target, self.transport.device)
        for place, instruction in zip(self._places(batch_size), program.instructions, strict=True):
            if not turn.last and _only_last(instruction):
                continue
            if self._pending:
                self._complete(instruction, clock)
            if turn.last and instruction is program.update and self.updater is not None:
                self.updater.clip()
            trains_loss = instruction is program.update and self.updater is not None and self.updater.trains_loss
            if self.context.rank in instruction.ranks or trains_loss:
                with clock.instruction(place):
                    self._run(instruction, program, place)
                    self._synchronise()
        self._complete(None, clock)
        loss, self._loss = self._loss, None
        return None if loss is None else float(loss.detach())

    def begin_evaluation(self) -> None:
        """Before ``predict``, after any training.

        Where evaluation mode runs other operations than training, the weights are gathered for the master to do it.
        """
        self._whole = None
        if self.graph.evaluable:
            return
        self.parameters.gather()
        if self.context.rank == 0:
            self._whole = copy.deepcopy(self.model).to(self.transport.device).eval()
            arrange_module(self._whole, channels_last=False)  # its own code may go by torch's usual order

    def predict(self, batch_size: int, x_BCHW: torch.Tensor | None) -> Any:
        """What the network returns for a batch, on the master; the model is in evaluation mode."""
        if not self.graph.evaluable:
            return self._predict_whole(x_BCHW)
        instructions = self._inference(batch_size)
        self.begin(batch_size, x_BCHW, training=False)
        with torch.no_grad():
            for instruction in instructions:
                if self.context.rank in instruction.ranks:
                    self._run(instruction, None, None)
        output = self._output() if self.context.rank == 0 else None
        self.forget()
        return output

    def _predict_whole(self, x_BCHW: torch.Tensor | None) -> Any:
        if self._whole is None or x_BCHW is None:
            return None
        with torch.no_grad():
            return self._whole(x_BCHW.to(self.transport.device, self.dtype))

    def gather(self) -> dict[str, torch.Tensor] | None:
        """The state dict of the whole model on the CPU, on the master; None elsewhere."""
        self.parameters.gather()
        if self.context.rank != 0:
            return None
        return {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.model.state_dict().items()
        }

    def compute(self, instruction: Compute, gradients: frozenset[Placed]) -> None:
        """Run a segment, forward or backward, on what is in ``values``; ``gradients`` need a gradient."""
        with self.throttle.work():
            (self._forward if instruction.direction == "forward" else self._backward)(instruction, gradients)

    def begin(self, batch_size: int, x_BCHW: torch.Tensor | None, *, training: bool) -> None:
        """Forget what was in flight, and take up a batch; the master gives the images."""
        self._batch_size = batch_size
        if training is not self._is_training:
            self._is_training = training
            for name, module in self.parameters.modules.values():
                for inner, one in module.named_modules(prefix=name):
                    one.training = self._modes[training][inner]
        self.forget()
        if x_BCHW is not None:
            source = master(self.plan.ranks)
            here = x_BCHW.to(self.transport.device, self.dtype)
            self.values[Placed(self.graph.input, source)] = arranged(here, channels_last=self.plan.channels_last)
        if training:
            self._masks.draw(batch_size, self.dtype)

    def forget(self) -> None:
        """Give back what is in flight."""
        self.values.clear()
        self._attached.clear()

    def _synchronise(self) -> None:
        if self.transport.device.type == "cuda":
            torch.cuda.synchronize(self.transport.device)

    def _complete(self, following: Instruction | None, clock: Clock) -> None:
        """End the exchanges under way that ``following`` cannot wait for."""
        left = []
        for one in self._pending:
            if may_go_on(one.exchange, following):
                left.append(one)
            else:
                with clock.instruction(one.place):
                    one.finish()
        self._pending = left

    def _run(self, instruction: Instruction, program: Program | None, place: int | None) -> None:
        if isinstance(instruction, Exchange):
            finish = self._exchange(instruction, program)
            if instruction.deferred:
                self._pending.append(_Pending(place, instruction, finish))
            else:
                finish()
        elif isinstance(instruction, Compute):
            self.compute(instruction, program.gradients if program is not None else frozenset())
        elif self.updater is not None:
            with self.throttle.work():
                self.updater.step()

    def _forward(self, instruction: Compute, gradients: frozenset[Placed]) -> None:
        if instruction.name == LOSS:
            assert self._recipe is not None
            self._loss = self._recipe.loss(self._output(), self._target)
            return
        # By layout as well as by name: a segment may use one tensor both whole and split.
        local = {placed: self.values[placed] for placed in instruction.inputs}
        for step in instruction.steps:
            result = self._call(step, local)
            if step.part == "moments":
                local[step.inputs[0]], result = result
            if step.output is not None:
                local[step.output] = result
        self._attached[instruction.segment] = [local[placed] for placed in instruction.outputs]
        for placed in instruction.outputs:
            self.values[placed] = _leaf(local[placed], placed in gradients)

    def _output(self) -> Any:
        """What the network returns, made of the tensors on the master."""
        layout = master(self.plan.ranks)
        return fx.map_arg(self._returned, lambda node: self.values[Placed(node.name, layout)])

    def _call(self, step: Step, local: dict[Placed, Any]) -> Any:
        operation = self.graph[step.operation]
        given = [local[placed] for placed in step.inputs]
        _, module = self.parameters.modules.get(operation.name, ("", None))
        if step.part == "moments":
            return batch_norm.moments(given[0], self.context.rank, self.context.size)
        if step.part == "normalise":
            assert module is not None
            return batch_norm.normalise(module, given[0], given[1], step.images)
        if step.part == "track":
            assert module is not None
            assert operation.shape is not None
            return batch_norm.track(module, given[0], step.images, math.prod(operation.shape[1:]))
        if operation.effect is Effect.FLATTEN:
            return given[0].flatten(1)
        if operation.noise is not None and self._is_training:
            assert step.output is not None
            spec = activation_spec(self.graph, operation.name, self._batch_size)
            box = spec.boxes(step.output.layout)[self.context.rank]
            return self._masks.apply(operation.name, operation.noise, given[0], spec, box)
        return self._call_as_written(step, given)

    def _call_as_written(self, step: Step, given: list[Any]) -> Any:
        """Call what the model calls, with this rank's parts of its tensors."""
        operation, node = self.graph[step.operation], self._nodes[step.operation]
        _, module = self.parameters.modules.get(operation.name, ("", None))
        args, kwargs = node.args, node.kwargs
        if not self._is_training:
            args, kwargs = node.meta.get(EVALUATION, (args, kwargs))
        by_name = dict(zip(operation.inputs, given, strict=True))

        def value_of(one: fx.Node) -> Any:
            return self.parameters.work[str(one.target)] if one.op == "get_attr" else by_name[one.name]

        args, kwargs = fx.map_arg(args, value_of), fx.map_arg(kwargs, value_of)
        target: Any = node.target
        if target == "view" and self.plan.channels_last:
            target = "reshape"  # what is one piece of memory by channel is none with the channels last
        with torch.set_grad_enabled(torch.is_grad_enabled() and not node.meta.get(NO_GRADIENT)):
            if step.in_place:
                return _in_place(module, args, kwargs)
            if module is not None:
                result = module(*args, **kwargs)
                if isinstance(module, nn.modules.instancenorm._InstanceNorm) and result.requires_grad:
                    # For one image torch 2.13 misreads the gradient of another memory format.
                    result.register_hook(torch.Tensor.contiguous)
                return result
            if node.op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)

    def _backward(self, instruction: Compute, gradients: frozenset[Placed]) -> None:
        if instruction.name == LOSS:
            assert self._loss is not None
            (self._loss if self._weight == 1 else self._loss * self._weight).backward()
            return
        # The weights' gradient, the second half of a divided computation, ends what the first has to keep.
        last = instruction.gradients != "inputs"
        attached = self._attached.pop(instruction.segment) if last else self._attached[instruction.segment]
        outputs, incoming = [], []
        for placed, made in zip(instruction.outputs, attached, strict=True):
            if placed not in gradients:
                continue
            for output, leaf in zip(pytree.tree_leaves(made), pytree.tree_leaves(self.values[placed]), strict=True):
                if isinstance(leaf, torch.Tensor) and leaf.grad is not None and output.requires_grad:
                    outputs.append(output)
                    incoming.append(leaf.grad)
                    if last:
                        leaf.grad = None
        if outputs:
            wanted = self._wanted(instruction, gradients)
            torch.autograd.backward(outputs, incoming, retain_graph=not last, inputs=wanted)

    def _wanted(self, instruction: Compute, gradients: frozenset[Placed]) -> list[torch.Tensor] | None:
        """The tensors whose gradients are to be computed; None for all."""
        if instruction.gradients == "all":
            return None
        if instruction.gradients == "inputs":
            return [self.values[placed] for placed in instruction.inputs if placed in gradients]
        return self.parameters.trained_by(instruction.operations)

    def _exchange(self, instruction: Exchange, program: Program | None) -> Callable[[], None]:
        """Begin an exchange; what is returned waits for its end and makes its result available."""
        forward = instruction.direction == "forward"
        if instruction.moves == "parameter":
            parameters = self.parameters
            return (parameters.send_to_work if forward else parameters.send_gradient_home)(instruction)
        if instruction.moves == "gradients":
            assert program is not None
            return self.parameters.sum_gradients(instruction, program.buckets[instruction.source.name])
        if forward:
            source, placed = self.values.get(instruction.source), instruction.target
        else:
            source, placed = self._gradient_or_zero(instruction), instruction.source
        received = self._empty(instruction, placed)
        wait = self.transport.start(instruction, source, received)
        needs_gradient = program is not None and placed in program.gradients

        def finish() -> None:
            wait()
            if received is None:
                return
            if forward:
                self.values[placed] = _leaf(received, needs_gradient)
            else:
                value = self.values[placed]
                value.grad = received if value.grad is None else value.grad.add_(received)

        return finish

    def _gradient_or_zero(self, instruction: Exchange) -> torch.Tensor | None:
        if instruction.target not in self.values:
            return None
        value = self.values[instruction.target]
        gradient: torch.Tensor | None = value.grad
        value.grad = None
        return torch.zeros_like(value) if gradient is None else gradient

    def _empty(self, instruction: Exchange, placed: Placed) -> torch.Tensor | None:
        box = instruction.spec.boxes(placed.layout)[self.context.rank]
        if not box:
            return None
        shape, last = instruction.spec.local_shape(box), self.plan.channels_last
        return empty(shape, channels_last=last, dtype=self.dtype, device=self.transport.device)


def _modes_by_name(model: nn.Module, graph_module: fx.GraphModule, *, training: bool) -> dict[str, bool]:
    """The mode of every module that is called, by its names in the traced model."""
    found = modes(model, training=training)
    return {name: found[one] for name, one in graph_module.named_modules(remove_duplicate=False) if one in found}


def _in_place(module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An activation or a sum, written to its first argument."""
    if module is None:
        total, summand = args
        total += summand
        return total
    setattr(module, "inplace", True)  # noqa: B010 - for torch's types a module has only tensors
    try:
        return module(*args, **kwargs)
    finally:
        setattr(module, "inplace", False)  # noqa: B010


def _places_of(program: Callable[[int], Program], full_batch: int, batch_size: int) -> list[int | None]:
    """For each instruction of a batch's program the place of its like in that of a full batch, if it has one.

    In a small batch some ranks may have no images, and with them exchanges fall away or come into being.
    """
    full = program(full_batch).instructions
    places = {(type(one), one.name, getattr(one, "direction", None)): place for place, one in enumerate(full)}
    own = program(batch_size).instructions
    return [places.get((type(one), one.name, getattr(one, "direction", None))) for one in own]


def _only_last(instruction: Instruction) -> bool:
    """Whether an instruction has its turn only in the last of several batches whose gradients are accumulated."""
    if isinstance(instruction, Exchange):
        return instruction.moves == "gradients" or (
            instruction.moves == "parameter" and instruction.direction == "backward"
        )
    return not isinstance(instruction, Compute)


def _leaf(value: Any, needs_gradient: bool) -> Any:
    """The value with its tensors as leaves of their own, so that each segment has an autograd graph of its own."""

    def cut(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        return one.detach().requires_grad_(needs_gradient and one.is_floating_point())

    return pytree.tree_map(cut, value)
