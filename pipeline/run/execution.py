"""Run a program on one rank: the local operations, the values in flight, and the explicit backward pass."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from pipeline.cluster.gang import RankContext
from pipeline.data.batches import Inputs, call, moved, prepared
from pipeline.graph.copies import Inputs as Given
from pipeline.graph.copies import set_mode, take_over
from pipeline.graph.effects import Effect
from pipeline.graph.nodes import INPUT, Weight, filled, leaves, mapped
from pipeline.graph.operations import Graph, Operation
from pipeline.links import Link
from pipeline.plan.instructions import (
    LOSS,
    Compute,
    Exchange,
    Instruction,
    Placed,
    Step,
    TensorSpec,
    may_go_on,
)
from pipeline.plan.layouts import Box, Range, master
from pipeline.plan.plan import Plan
from pipeline.plan.program import Program, activation_spec, compile_inference, compile_program
from pipeline.run import batch_norm
from pipeline.run.calls import Calls, Part
from pipeline.run.clock import Clock
from pipeline.run.emulation import Throttle
from pipeline.run.memory_format import arranged, empty
from pipeline.run.noise import Draws
from pipeline.run.parameters import Parameters
from pipeline.run.parts import Parts
from pipeline.run.recipe import Recipe, Turn, Updater
from pipeline.run.transport import Transport

_EXACT_SUMS = 8192
"""Values per channel of which torch's BatchNorm makes a variance good to 1e-5 in float32 with the channels last: its
error grows with their number, 1e-6 at 2,048 and 3e-5 at 100,000 (torch 2.13, CPU), and has been seen at 1e-2."""


class _Pending(NamedTuple):
    """An exchange that is under way."""

    place: int | None
    exchange: Exchange
    finish: Callable[[], None]


class Execution:
    """One rank's part of a plan.

    ``parts`` of the model are given on the master only. Every rank must make the same calls in the same order, with the
    same batch sizes.
    """

    def __init__(
        self, context: RankContext, parts: Parts | None, graph: Graph, plan: Plan, link: Link | None = None
    ) -> None:
        self.context, self.graph, self.plan = context, graph, plan
        self.transport = Transport(context, link=link, channels_last=plan.channels_last)
        self.throttle = Throttle(context.device)
        self._modules = parts.modules if parts is not None else {}
        self._modes = {name: _modes(module) for name, module in self._modules.items()}
        self.parameters = Parameters(parts, graph, plan, self.transport)
        self._constants = {name: one.to(self.transport.device) for name, one in graph.constants.items()}
        self.dtype = graph.dtype
        self._dtypes = {one.name: one.dtype for one in graph.operations}
        self._calls: dict[tuple[str, bool], Calls] = {}
        """By operation and mode."""
        self.program = functools.lru_cache(maxsize=8)(functools.partial(compile_program, graph, plan))
        """The program for a batch size; the last batch of an epoch is often smaller."""
        self._places = functools.lru_cache(maxsize=8)(functools.partial(_places_of, self.program, plan.batch_size))
        self._inference = functools.lru_cache(maxsize=8)(functools.partial(compile_inference, graph, plan))
        self.values: dict[Placed, Any] = {}
        """The tensors in flight, each a leaf of its own whose gradient gathers in ``.grad``."""
        self._batch_size = 0
        self._is_training: bool | None = None
        self._weight = 1.0
        self._draws = Draws(graph, self.transport.device)
        self._inputs: dict[str, torch.Tensor] = {}
        """On the master, what the model takes beside the first input, by operation."""
        self._attached: dict[int, list[Any]] = {}
        self._pending: list[_Pending] = []
        self._target: Any = None
        self._loss: torch.Tensor | None = None
        self._recipe: Recipe | None = None
        self._whole: nn.Module | None = None
        """On the master, the model to evaluate where the graph cannot do it."""
        self.updater: Updater | None = None

    def prepare(self, recipe: Recipe) -> None:
        """Move the parameters to their homes and make an optimiser for those that live here."""
        # Said of activations with the channels last where a computation begins, which no optimiser reads.
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        self.parameters.load()
        self._recipe = recipe.on(self.transport.device)
        self.updater = Updater(self._recipe, self.parameters, self.context)

    def train_step(
        self,
        batch_size: int,
        inputs: Inputs | None,
        target: Any,
        clock: Clock,
        turn: Turn,
    ) -> float | None:
        """One step of training on a batch of ``batch_size`` images; the master gives the batch and gets the loss.

        ``inputs`` are a tensor, or the tuple or dictionary of tensors that the model takes; ``target`` is whatever the
        loss takes.
        """
        program = self.program(batch_size)
        self.begin(batch_size, inputs, training=True)
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

    def begin_evaluation(self, whole: nn.Module | None = None) -> None:
        """Before ``predict``, after any training.

        Where evaluation mode runs other operations than training, the weights are gathered for ``whole``, the model on
        the master, to do it.
        """
        self._whole = None
        if self.graph.evaluable:
            return
        tensors = self.parameters.gather()
        if whole is not None:
            take_over(whole, tensors)  # its own code may go by torch's usual order in memory
            self._whole = whole.to(self.transport.device).eval()

    def predict(self, batch_size: int, inputs: Inputs | None) -> Any:
        """What the network returns for a batch, on the master; the model is in evaluation mode."""
        if not self.graph.evaluable:
            return self._predict_whole(inputs)
        instructions = self._inference(batch_size)
        self.begin(batch_size, inputs, training=False)
        with torch.no_grad():
            for instruction in instructions:
                if self.context.rank in instruction.ranks:
                    self._run(instruction, None, None)
        output = self._output() if self.context.rank == 0 else None
        self.forget()
        return output

    def _predict_whole(self, inputs: Inputs | None) -> Any:
        if self._whole is None or inputs is None:
            return None
        with torch.no_grad():
            return call(self._whole, prepared(inputs, self.transport.device, self.dtype))

    def gather(self) -> dict[str, torch.Tensor] | None:
        """The parameters and buffers of the graph on the CPU by name, on the master; None elsewhere."""
        tensors = self.parameters.gather()
        if self.context.rank != 0:
            return None
        return {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }

    def compute(self, instruction: Compute, gradients: frozenset[Placed]) -> None:
        """Run a segment, forward or backward, on what is in ``values``; ``gradients`` need a gradient."""
        with self.throttle.work():
            (self._forward if instruction.direction == "forward" else self._backward)(instruction, gradients)

    def begin(self, batch_size: int, inputs: Inputs | None, *, training: bool) -> None:
        """Forget what was in flight, and take up a batch; the master gives the images."""
        self._batch_size = batch_size
        if training is not self._is_training:
            self._is_training = training
            for name, module in self._modules.items():
                _set_modes(module, self._modes[name], training=training)
        self.forget()
        if inputs is not None:
            first, *others = Given.of(prepared(inputs, self.transport.device, self.dtype)).tensors
            source = Placed(self.graph.input, master(self.plan.ranks))
            self.values[source] = arranged(first, channels_last=self.plan.channels_last)
            self._inputs = dict(zip(self.graph.further_inputs, others, strict=True))
        self._agree_on_random_numbers()
        self._draws.draw(batch_size, self._weight_of, training=training)

    def _agree_on_random_numbers(self) -> None:
        """Take up the master's generator, from which its images, the loss or a metric may have drawn since."""
        if not self.graph.drawn or self.context.group is None or self.context.size == 1:
            return
        state = torch.get_rng_state()
        dist.broadcast(state, 0, group=self.context.group)
        torch.set_rng_state(state)

    def _weight_of(self, name: str) -> Any:
        """A weight or constant, or this rank's part of it; None for a bias that another rank adds."""
        return self._constants[name] if name in self._constants else self.parameters.work.get(name)

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
        names = dict.fromkeys(self.graph.outputs)
        return filled(
            self.graph.returned, {name: self.values[Placed(name, layout)] for name in names}, self._batch_size
        )

    def _call(self, step: Step, local: dict[Placed, Any]) -> Any:
        operation = self.graph[step.operation]
        given = [local[placed] for placed in step.inputs]
        if step.part != "whole":
            return self._normalise(operation, step, given)
        if self._needs_own_statistics(operation):
            return self._normalise_whole(operation, given[0])
        if operation.effect is Effect.FLATTEN:
            return given[0].flatten(1)
        if operation.main.target == INPUT:
            return self._input(operation)
        rank, spec = self.context.rank, None
        if operation.shape is not None:
            spec = activation_spec(self.graph, operation.name, self._batch_size)
        assert step.output is not None or operation.shape is None
        if operation.noise is not None and self._is_training:
            assert step.output is not None
            box = self._box(spec, step)
            return self._draws.apply(operation, given[0], spec, box)
        values = {**self._draws.values, **dict(zip(operation.inputs, given, strict=True))}
        return self._calls_of(operation).run(Part(rank, step, self._batch_size, spec), values, self._weight_of)

    def _input(self, operation: Operation) -> torch.Tensor:
        """An input beside the first one; where only times matter there is none, and zeros do."""
        if operation.name in self._inputs:
            return self._inputs[operation.name]
        shape = (self._batch_size, *(operation.shape or ()))
        return torch.zeros(shape, dtype=operation.dtype, device=self.transport.device)

    def _box(self, spec: TensorSpec | None, step: Step) -> Box:
        """This rank's part of an output; of one that cannot travel by its images alone."""
        assert step.output is not None
        if spec is not None:
            return spec.boxes(step.output.layout)[self.context.rank]
        layout = step.output.layout
        if layout.kind != "B":
            return Box(Range(0, self._batch_size), Range(0, 1))
        start = sum(layout.shares[: self.context.rank])
        return Box(Range(start, start + layout.shares[self.context.rank]), Range(0, 1))

    def _calls_of(self, operation: Operation) -> Calls:
        key = operation.name, bool(self._is_training)
        if key not in self._calls:
            evaluation = None if self._is_training else self.graph.evaluation
            self._calls[key] = Calls(operation, self.transport.device, self._modules, evaluation)
        return self._calls[key]

    def _needs_own_statistics(self, operation: Operation) -> bool:
        """Whether torch's BatchNorm would be too inexact."""
        if operation.effect is not Effect.BATCHNORM or not self._is_training or not self.plan.channels_last:
            return False
        assert operation.shape is not None
        values = self._batch_size * math.prod(operation.shape[1:])
        return operation.dtype is torch.float32 and values > _EXACT_SUMS

    def _normalise_whole(self, operation: Operation, x_BCE: torch.Tensor) -> torch.Tensor:
        """A BatchNorm of all images, by the same arithmetic as one whose images are split."""
        eps = float(operation.main.argument("eps"))
        affine = self._argument_of(operation, "weight"), self._argument_of(operation, "bias")
        output_BCE, moments_RC = batch_norm.of_all(x_BCE, *affine, eps)
        if operation.tracks:
            self._track(operation, moments_RC, (self._batch_size,))
        return output_BCE

    def _argument_of(self, operation: Operation, name: str) -> torch.Tensor | None:
        """A weight that the call of an operation takes by this name."""
        found = operation.main.argument(name)
        return self._weight_of(found.name) if isinstance(found, Weight) else None

    def _track(self, operation: Operation, moments_RC: torch.Tensor, images: Sequence[int]) -> None:
        """Update running statistics."""
        assert operation.shape is not None
        self._calls_of(operation).before({}, self._weight_of, self._batch_size)  # it counts batches
        mean_C, variance_C = (self._argument_of(operation, name) for name in ("running_mean", "running_var"))
        assert mean_C is not None
        assert variance_C is not None
        momentum, positions = float(operation.main.argument("momentum")), math.prod(operation.shape[1:])
        batch_norm.track(mean_C, variance_C, momentum, moments_RC, images, positions)

    def _normalise(self, operation: Operation, step: Step, given: list[Any]) -> Any:
        """A part of a BatchNorm over images that are split."""
        if step.part == "moments":
            return batch_norm.moments(given[0], self.context.rank, self.context.size)

        if step.part == "normalise":
            affine = self._argument_of(operation, "weight"), self._argument_of(operation, "bias")
            eps = float(operation.main.argument("eps"))
            return batch_norm.normalise(given[0], given[1], step.images, *affine, eps)
        return self._track(operation, given[0], step.images)

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
            for output, leaf in zip(leaves(made), leaves(self.values[placed]), strict=True):
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
        dtype = self._dtypes.get(placed.name, self.dtype)
        return empty(shape, channels_last=last, dtype=dtype, device=self.transport.device)


def _modes(module: nn.Module) -> dict[str, bool]:
    """Whether each part of a submodule is in training mode when the model is."""
    set_mode(module, training=True)
    return {name: one.training for name, one in module.named_modules()}


def _set_modes(module: nn.Module, modes: dict[str, bool], *, training: bool) -> None:
    if not training:
        module.eval()
        return
    for name, one in module.named_modules():
        one.training = modes[name]


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

    return mapped(value, cut)
