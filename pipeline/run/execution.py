"""Run a program on one rank: the local operations, the values in flight, and the explicit backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from pipeline.cluster.gang import RankContext
from pipeline.graph.trace import Graph, traced
from pipeline.plan.layouts import Layout
from pipeline.plan.plan import Plan
from pipeline.plan.program import LOSS, Compute, Exchange, Instruction, Placed, Program, compile_program
from pipeline.run.clock import Clock
from pipeline.run.emulation import Throttle
from pipeline.run.parameters import Parameters
from pipeline.run.transport import Transport

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Execution:
    """One rank's part of a plan.

    ``model`` is the real model on the master and a skeleton on the meta device elsewhere. Every rank must make the same
    calls in the same order, with the same batch sizes.
    """

    def __init__(self, context: RankContext, model: nn.Module, graph: Graph, plan: Plan) -> None:
        self.context, self.graph, self.plan, self.model = context, graph, plan, model
        self.transport = Transport(context)
        self.throttle = Throttle(context.device)
        graph_module = traced(model)
        self._nodes = {node.name: node for node in graph_module.graph.nodes}
        self._plans = {planned.name: planned for planned in plan.operations}
        self.parameters = Parameters(graph_module, graph, plan, self.transport)
        self._get_attribute = functools.partial(_attribute, graph_module)
        self.dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())
        self.program = functools.lru_cache(maxsize=8)(functools.partial(compile_program, graph, plan))
        """The program for a batch size; the last batch of an epoch is often smaller."""
        self.values: dict[Placed, Any] = {}
        """The tensors in flight, each a leaf of its own whose gradient gathers in ``.grad``."""
        self._attached: dict[int, list[Any]] = {}
        self._deferred: tuple[int, Callable[[], None]] | None = None
        """Position and rest of an exchange that is under way."""
        self._target: torch.Tensor | None = None
        self._loss: torch.Tensor | None = None
        self._loss_function: Loss | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def prepare(self, loss: Loss, optimizer: OptimizerFactory) -> None:
        """Move the parameters to their homes and make an optimiser for those that live here."""
        self.parameters.load()
        self._loss_function = loss
        trained = self.parameters.trained
        self._optimizer = optimizer(trained) if trained else None

    def train_step(
        self, batch_size: int, x_BCHW: torch.Tensor | None, y_B: torch.Tensor | None, clock: Clock
    ) -> float | None:
        """One step of training on a batch of ``batch_size`` images; the master gives the batch and gets the loss."""
        program = self.program(batch_size)
        self._training(True)
        self.parameters.clear_gradients()
        self.values.clear()
        self._feed(x_BCHW)
        self._target = None if y_B is None else y_B.to(self.transport.device)
        for index, instruction in enumerate(program.instructions):
            if not (isinstance(instruction, Compute) and instruction.gradients == "parameters"):
                self._complete_deferred(clock)
            if self.context.rank in instruction.ranks:
                with clock.instruction(index):
                    self._run(instruction, program, index)
                    self._synchronise()
        self._complete_deferred(clock)
        loss, self._loss = self._loss, None
        return None if loss is None else float(loss.detach())

    def predict(self, batch_size: int, x_BCHW: torch.Tensor | None) -> torch.Tensor | None:
        """The network's output for a batch, on the master; the model is in evaluation mode."""
        program = self.program(batch_size)
        self._training(False)
        self.values.clear()
        self._feed(x_BCHW)
        with torch.no_grad():
            for instruction in program.inference:
                if self.context.rank in instruction.ranks:
                    self._run(instruction, program, 0)
        output: torch.Tensor | None = self.values.get(program.output)
        self.values.clear()
        self._attached.clear()
        return output

    def gather(self) -> dict[str, torch.Tensor] | None:
        """The state dict of the whole model on the CPU, on the master; None elsewhere."""
        self.parameters.gather()
        if self.context.rank != 0:
            return None
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def _feed(self, x_BCHW: torch.Tensor | None) -> None:
        if x_BCHW is not None:
            source = Layout("M", (1,) + (0,) * (self.plan.ranks - 1))
            self.values[Placed(self.graph.input, source)] = x_BCHW.to(self.transport.device, self.dtype)

    def _training(self, mode: bool) -> None:
        for module in self.parameters.modules.values():
            module.train(mode)

    def _synchronise(self) -> None:
        if self.transport.device.type == "cuda":
            torch.cuda.synchronize(self.transport.device)

    def _complete_deferred(self, clock: Clock) -> None:
        if self._deferred is not None:
            index, finish = self._deferred
            self._deferred = None
            with clock.instruction(index):
                finish()

    def _run(self, instruction: Instruction, program: Program, index: int) -> None:
        if isinstance(instruction, Exchange):
            finish = self._exchange(instruction, program)
            if instruction.deferred:
                self._deferred = index, finish
            else:
                finish()
            return
        if isinstance(instruction, Compute):
            self.compute(instruction, program.gradients)
        elif self._optimizer is not None:
            with self.throttle.work():
                self._optimizer.step()

    def compute(self, instruction: Compute, gradients: frozenset[Placed]) -> None:
        """Run a segment, forward or backward, on what is in ``values``; ``gradients`` need a gradient."""
        with self.throttle.work():
            (self._forward if instruction.direction == "forward" else self._backward)(instruction, gradients)

    def _forward(self, instruction: Compute, gradients: frozenset[Placed]) -> None:
        if instruction.name == LOSS:
            assert self._loss_function is not None
            assert self._target is not None
            self._loss = self._loss_function(self.values[instruction.inputs[0]], self._target)
            return
        # By layout as well as by name: a segment may use one tensor both whole and split.
        local = {placed: self.values[placed] for placed in instruction.inputs}
        for name in instruction.operations:
            planned = self._plans[name]
            local[Placed(name, planned.output)] = self._call(self._nodes[name], planned.input, local)
        self._attached[instruction.segment] = [local[placed] for placed in instruction.outputs]
        for placed in instruction.outputs:
            self.values[placed] = self._leaf(local[placed], placed in gradients)

    def _call(self, node: fx.Node, layout: Layout, local: dict[Placed, Any]) -> Any:
        args = fx.map_arg(node.args, lambda one: local[Placed(one.name, layout)])
        kwargs = fx.map_arg(node.kwargs, lambda one: local[Placed(one.name, layout)])
        target: Any = node.target
        if node.op == "call_module":
            return self.parameters.modules[target](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return self._get_attribute(target) if node.op == "get_attr" else target(*args, **kwargs)

    def _backward(self, instruction: Compute, gradients: frozenset[Placed]) -> None:
        if instruction.name == LOSS:
            assert self._loss is not None
            self._loss.backward()
            return
        # The weights' gradient, the second half of a divided computation, ends what the first has to keep.
        last = instruction.gradients != "inputs"
        attached = self._attached.pop(instruction.segment) if last else self._attached[instruction.segment]
        outputs, incoming = [], []
        for placed, output in zip(instruction.outputs, attached, strict=True):
            gradient = self.values[placed].grad if placed in gradients else None
            if gradient is not None:
                outputs.append(output)
                incoming.append(gradient)
            if last:
                self.values[placed].grad = None
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

    def _exchange(self, instruction: Exchange, program: Program) -> Callable[[], None]:
        """Begin an exchange; what is returned waits for its end and makes its result available."""
        if instruction.parameter:
            parameters = self.parameters
            forward = instruction.direction == "forward"
            return (parameters.send_to_work if forward else parameters.send_gradient_home)(instruction)
        if instruction.direction == "forward":
            source, placed = self.values.get(instruction.source), instruction.target
        else:
            source, placed = self._gradient_or_zero(instruction), instruction.source
        received = self._empty(instruction, placed)
        wait = self.transport.start(instruction, source, received)

        def finish() -> None:
            wait()
            if received is None:
                return
            if instruction.direction == "forward":
                self.values[placed] = self._leaf(received, placed in program.gradients)
            else:
                value = self.values[placed]
                value.grad = received if value.grad is None else value.grad.add_(received)

        return finish

    def _gradient_or_zero(self, instruction: Exchange) -> torch.Tensor | None:
        if instruction.target not in self.values:
            return None
        gradient = self._take_gradient(instruction.target)
        return torch.zeros_like(self.values[instruction.target]) if gradient is None else gradient

    def _take_gradient(self, placed: Placed) -> torch.Tensor | None:
        value = self.values[placed]
        gradient: torch.Tensor | None = value.grad
        value.grad = None
        return gradient

    def _empty(self, instruction: Exchange, placed: Placed) -> torch.Tensor | None:
        box = instruction.spec.boxes(placed.layout)[self.context.rank]
        if not box:
            return None
        return torch.empty(instruction.spec.local_shape(box), dtype=self.dtype, device=self.transport.device)

    @staticmethod
    def _leaf(value: Any, needs_gradient: bool) -> Any:
        """The value as a leaf of its own, so that each segment has an autograd graph of its own."""
        return value.detach().requires_grad_(needs_gradient) if isinstance(value, torch.Tensor) else value


def _attribute(root: nn.Module, target: str) -> Any:
    owner, _, leaf = target.rpartition(".")
    return getattr(root.get_submodule(owner), leaf)
