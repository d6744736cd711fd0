"""From a model to its graph: captured, compared with the model itself, and taken apart only where both agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipeline.compiled import without_compiler
from pipeline.errors import InputError
from pipeline.graph import check, opaque
from pipeline.graph.analysis import Analysis
from pipeline.graph.capture import Captured, Uncapturable, capture
from pipeline.graph.check import Behaviour, Facts, difference, reason_of
from pipeline.graph.copies import Inputs, copied, gradients_kept, model_dtype, set_mode, tensors_of
from pipeline.graph.evaluation import evaluated
from pipeline.graph.interpret import run_all
from pipeline.graph.nodes import MODULE, Form, Images, Node, Value, filled
from pipeline.graph.operations import Graph, Opaque, Operation, Parameter
from pipeline.graph.sources import without_examples
from pipeline.graph.suspects import suspects
from pipeline.graph.writes import without_writes

__all__ = ["Graph", "Opaque", "Operation", "Parameter", "model_dtype", "trace"]

_IMAGES = 2
"""How many the model is tried on: one could not be told from a number, and BatchNorm needs two."""


def trace(model: nn.Module, example_input: Any) -> Graph:
    """Capture ``model`` and give every operation its shapes for images like ``example_input``.

    ``example_input`` is a batch ``(B, C, H, W)`` with B >= 1, a tuple of tensors that the model takes by position, or a
    dictionary of those it takes by keyword; in each the first axis is that of the images. The captured calls are
    compared with the model in training and evaluation mode, on two of the images. Where they differ, or nothing can be
    captured, the smallest submodules that are to blame stay whole. All of it is done on copies: the model is left as it
    was, and so are the random numbers to come.

    Raises ``InputError`` if the model does not take such images.
    """
    model = without_compiler(model)
    return _Attempts(model, Inputs.of(example_input)).graph()


@dataclass(frozen=True)
class _Agreed:
    """Calls that do what the model does."""

    captured: Captured
    facts: Facts
    trained: frozenset[str]
    """The parameters that get a gradient."""


class _Attempts:
    """Captures with more and more of the model kept whole, until calls and model agree."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._model = model
        self._inputs = inputs.to(model_dtype(model)).with_images(_IMAGES)
        self._name = type(model).__name__
        if not inputs.tensors or any(not one.dim() for one in inputs.tensors):
            raise InputError(f"{self._name} is given no images: an example is a batch (B, C, H, W) of them")
        try:
            self._wanted, flops = check.model_behaviour(model, self._inputs, count=True)
        except Exception as error:
            shapes = " and ".join(str(tuple(one.shape[1:])) for one in inputs.tensors)
            raise InputError(
                f"the model does not take images of shape {shapes} (C, H, W): {reason_of(error)}"
            ) from error
        self._flops = flops // _IMAGES

    def graph(self) -> Graph:
        """What the model is, with as little of it whole as can be."""
        whole: dict[str, str] = {}
        while "" not in whole:
            blamed: dict[str, str] = {}
            try:
                agreed, reason = self._attempt(whole)
                if agreed is not None:
                    return self._analysed(agreed, whole)
            except Uncapturable as error:
                reason = error.reason
                if error.module is not None and error.module not in whole:
                    blamed = {error.module: reason}
            if not blamed:
                blamed = self._blamed(whole, reason)
            whole = _outermost({**whole, **blamed})
        return self._undivided(whole[""])

    def _blamed(self, whole: Mapping[str, str], reason: str) -> dict[str, str]:
        """What else is to stay whole: the smallest submodules to blame; after these, what they are part of."""
        if whole:
            return {name.rpartition(".")[0]: why for name, why in whole.items()} or {"": reason}
        return suspects(self._model, self._inputs) or {"": reason}

    def _attempt(self, whole: Mapping[str, str]) -> tuple[_Agreed | None, str]:
        try:
            records = opaque.recorded(self._model, self._inputs, whole) if whole else {}
        except ValueError as error:
            raise Uncapturable(str(error)) from error
        trial = copied(self._model, share_parameters=True)
        set_mode(trial, training=True)
        with check.seeded(), gradients_kept(trial):
            captured = without_examples(without_writes(capture(trial, self._inputs, records)))
        facts = Facts()
        found = self._behaviour(captured, facts)
        reason = difference(found, self._wanted)
        if reason is not None:
            return None, reason
        return _Agreed(captured, facts, frozenset(found.gradients)), ""

    def _behaviour(
        self, captured: Captured, facts: Facts, *, training: bool = True, inputs: Inputs | None = None
    ) -> Behaviour:
        """What captured calls do, with other ``inputs`` than usual if these are given."""
        given = inputs or self._inputs
        trial = copied(self._model, share_parameters=True)
        set_mode(trial, training=training)
        tensors = tensors_of(trial)
        weights = {**tensors, **captured.constants}
        modules = {one.submodule: trial.get_submodule(one.submodule) for one in captured.nodes if one.submodule}

        def call() -> Any:
            values: dict[str, Any] = dict(zip(captured.inputs, (one.clone() for one in given.tensors), strict=True))
            facts.begin()
            run_all(captured.nodes, values, weights, modules, given.images, facts.note)
            return filled(captured.returned, values, given.images)

        with gradients_kept(trial), torch.set_grad_enabled(training):
            try:
                return check.behaviour(call, tensors, calls=check.CALLS if training else 1, backward=training)
            except Exception as error:
                raise Uncapturable(f"its calls fail: {reason_of(error)}") from error

    def _analysed(self, agreed: _Agreed, whole: Mapping[str, str]) -> Graph:
        evaluable = self._is_evaluable(agreed.captured)
        graph = Analysis(
            self._model, agreed.captured, agreed.facts, agreed.trained, model_dtype(self._model), self._inputs.keys
        ).graph()
        if not graph.outputs:
            raise InputError(f"{self._name}.forward returns nothing that depends on its input")
        return replace(
            graph,
            evaluable=evaluable,
            opaque=tuple(Opaque(name, reason) for name, reason in whole.items()),
            convolution_flops=self._flops,
        )

    def _is_evaluable(self, captured: Captured) -> bool:
        """Whether the calls, told that it is evaluation, give what the model gives then."""
        found = evaluated(captured.nodes)
        nodes = tuple(one for node in captured.nodes if (one := found.get(node.name, node)) is not None)
        same = self._is_same_in_evaluation(replace(captured, nodes=nodes), self._inputs)
        if same and self._is_same_in_evaluation(replace(captured, nodes=nodes), self._inputs.with_images(1)) is False:
            raise Uncapturable("it does something else for a single image")
        return bool(same)

    def _is_same_in_evaluation(self, captured: Captured, inputs: Inputs) -> bool | None:
        """Whether calls give what the model gives in evaluation; None where the model itself fails."""
        try:
            wanted, _ = check.model_behaviour(self._model, inputs, training=False)
        except Exception:  # noqa: BLE001 - whatever the model's own code raises: a run will tell
            return None
        try:
            done = self._behaviour(captured, Facts(), training=False, inputs=inputs)
        except Uncapturable:
            return False
        return difference(done, wanted) is None

    def _undivided(self, reason: str) -> Graph:
        """The model as one operation."""
        names = tuple("input" if not index else f"input_{index}" for index in range(len(self._inputs.tensors)))
        args, kwargs = self._inputs.rebuilt([Value(name) for name in names])
        node = Node(
            name="model", target=MODULE, args=args, kwargs=kwargs, module="", results=(), is_tensor=False
        )  # fmt: skip
        forms = tuple(
            Form((Images(1), *one.shape[1:]), one.dtype, tuple(range(one.dim()))) for one in self._inputs.tensors
        )
        captured = Captured(inputs=names, forms=forms, nodes=(node,), returned=Value("model"), constants={})
        facts = Facts(differentiable={"model"} if self._wanted.gradients else set())
        agreed = _Agreed(captured, facts, frozenset(self._wanted.gradients))
        graph = Analysis(
            self._model, agreed.captured, agreed.facts, agreed.trained, model_dtype(self._model), self._inputs.keys
        ).graph()
        return replace(graph, evaluable=True, opaque=(Opaque("", reason),), convolution_flops=self._flops)


def _outermost(whole: Mapping[str, str]) -> dict[str, str]:
    """Without what is part of another."""
    return {
        name: reason
        for name, reason in whole.items()
        if not any(name != other and (not other or name.startswith(f"{other}.")) for other in whole)
    }
