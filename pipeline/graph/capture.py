"""From a model to its calls of ATen operators, by ``torch.export``: names, numbers of images, and nothing hidden.

The number of images stays a symbol. Submodules that are to run as they are become one call each. What an export wraps
in a call of its own (``torch.no_grad``, ``torch.autocast``) is told by each call within.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from typing import Any, TextIO

import sympy
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode

from pipeline.graph import opaque
from pipeline.graph.copies import Inputs, names_of
from pipeline.graph.nodes import (
    MODULE,
    Form,
    Here,
    Images,
    Node,
    Size,
    Value,
    Weight,
    argument_names,
    is_size_function,
    mapped,
)

_ASSERTIONS = (
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range",
    "sym_constrain_range_for_size", "_assert_tensor_metadata_msg",
)  # fmt: skip
_BACKENDS = ("cudnn_enabled", "cudnn_enable")
"""Arguments that say whether cuDNN may be used, which an export switches off for its own time."""
_LEAST, _MOST = 2, 2**31
"""Numbers of images between which calls have to be the same; one image is tried."""
_PROBES = (2, 3, 5, 7)
"""Numbers of images on which a size has to lie on a line."""


class Uncapturable(Exception):  # noqa: N818 - never leaves this package
    """A model of which there are no calls; ``module`` is the innermost submodule that is to blame, if known."""

    def __init__(self, reason: str, module: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.module = reason, module


@dataclass(frozen=True, kw_only=True)
class Captured:
    """The calls of a model in one mode."""

    inputs: tuple[str, ...]
    """Names of its inputs, in the order of ``Inputs.tensors``."""
    forms: tuple[Form, ...]
    """Of the inputs."""
    nodes: tuple[Node, ...]
    returned: Any
    """What the model returns, with the names of calls for its tensors."""
    constants: Mapping[str, torch.Tensor]
    """Tensors that the model's code makes of nothing but Python numbers, by name."""


class _Root(nn.Module):
    """Calls a model with tensors in a row, and gives its tensors in a row."""

    def __init__(self, model: nn.Module, rebuilt: Rebuilt, note: Callable[[Any], None]) -> None:
        """``note`` is told what the model gave, with positions for its tensors."""
        super().__init__()
        self.model = model
        self._rebuilt, self._note = rebuilt, note  # an export would take back what is assigned in forward
        self.training = model.training

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        args, kwargs = self._rebuilt(list(tensors))
        found: list[Any] = []

        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor | torch.SymInt | torch.SymFloat):
                return leaf
            found.append(leaf)
            return Value(str(len(found) - 1))

        with _Detached():
            self._note(mapped(self.model(*args, **kwargs), placed))
        return tuple(found)


class _Detached(TorchFunctionMode):
    """Takes ``tensor.data``, which an export loses sight of, for ``tensor.detach()``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        return func(*args, **(kwargs or {}))


Rebuilt = Callable[[list[Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""Makes arguments and keyword arguments of tensors in a row."""


def exported(
    model: nn.Module, tensors: Sequence[torch.Tensor], rebuilt: Rebuilt, dims: Sequence[Mapping[int, Any]]
) -> tuple[ExportedProgram, Any]:
    """The program of a model in the mode it is in, and what it returns with positions for its tensors.

    ``dims`` are the axes of each tensor that stay symbols. ``model`` may be left in any state. Raises ``Uncapturable``.
    """
    returned: list[Any] = []
    root = _Root(model, rebuilt, returned.append)
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            program = export(root, tuple(tensors), strict=False, dynamic_shapes=(tuple(map(dict, dims)),))
    except Exception as error:  # export fails in as many ways as there are models
        if "Constraints violated" in str(error):
            raise Uncapturable("the number of images is taken for a fixed one, as by len(x); use x.shape[0]") from error
        raise Uncapturable(f"torch.export: {_reason(error)}") from error
    return program, returned[-1]


def capture(model: nn.Module, inputs: Inputs, whole: Mapping[str, opaque.Record]) -> Captured:
    """The calls of ``model`` in the mode it is in; the submodules in ``whole`` are one call each.

    ``model`` may be left in any state. Raises ``Uncapturable``.
    """
    names = names_of(model)
    images: Any = Dim.DYNAMIC if len(inputs.tensors) == 1 else Dim("images")
    dims = [{0: images} if one.dim() else {} for one in inputs.tensors]
    with opaque.replaced(model, whole) as stubs:
        program, returned = exported(model, inputs.tensors, inputs.rebuilt, dims)
    if any(one.lower > _LEAST or one.upper < _MOST for one in program.range_constraints.values()):
        raise Uncapturable("it does something else for other numbers of images")
    return _Conversion(program, returned, names, stubs).captured()


class _Conversion:
    """From an exported program to plain calls."""

    def __init__(
        self, program: ExportedProgram, returned: Any, names: Mapping[int, str], stubs: Mapping[str, opaque.Record]
    ) -> None:
        self._program, self._returned, self._names, self._stubs = program, returned, names, stubs
        self._nodes: list[Node] = []
        self._taken: set[str] = set()
        self._inputs: list[str] = []
        self._forms: list[Form] = []
        self._constants: dict[str, torch.Tensor] = {}

    def captured(self) -> Captured:
        program = self._program
        held = {**program.state_dict, **program.constants}
        kinds = {one.arg.name: one for one in program.graph_signature.input_specs if hasattr(one.arg, "name")}
        known: dict[fx.Node, Any] = {}
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = kinds[node.name]
            if spec.kind is InputKind.USER_INPUT:
                name = self._unique(node.name.replace("tensors_", "input_"))
                self._inputs.append(name)
                self._forms.append(_form(node.meta["val"]))
                known[node] = Value(name)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                known[node] = Weight(self._name_of(held.get(spec.target), spec.target))
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                tensor = held[spec.target]
                name = self._name_of(tensor, "")
                if not name:
                    name = f"constant {len(self._constants)}"
                    self._constants[name] = tensor.detach().clone()
                known[node] = Weight(name)
            else:
                raise Uncapturable(f"it takes an input of kind {spec.kind.name}")
        results = self._walk(program.graph_module, known, gradients=True, autocast=None)
        returned = mapped(self._returned, lambda leaf: results[int(leaf.name)] if isinstance(leaf, Value) else leaf)
        return Captured(
            inputs=tuple(self._inputs),
            forms=tuple(self._forms),
            nodes=tuple(self._nodes),
            returned=returned,
            constants=self._constants,
        )

    def _name_of(self, tensor: torch.Tensor | None, target: str | None) -> str:
        found = self._names.get(id(tensor))
        return found if found is not None else (target or "").removeprefix("model.")

    def _walk(
        self, module: fx.GraphModule, known: dict[fx.Node, Any], *, gradients: bool, autocast: tuple[Any, ...] | None
    ) -> tuple[Any, ...]:
        """Take over the calls of a graph; what it returns."""
        for node in module.graph.nodes:
            if node.op == "output":
                return tuple(self._argument(one, known) for one in node.args[0])
            if node.op == "call_function":
                known[node] = self._call(module, node, known, gradients=gradients, autocast=autocast)
        raise AssertionError("a graph without an output")

    def _call(
        self,
        module: fx.GraphModule,
        node: fx.Node,
        known: dict[fx.Node, Any],
        *,
        gradients: bool,
        autocast: tuple[Any, ...] | None,
    ) -> Any:
        target, value = node.target, node.meta.get("val")
        name = getattr(target, "__name__", str(target))
        if name == "wrap_with_set_grad_enabled":
            enabled, inner, *given = node.args
            return self._inner(module, inner, given, known, gradients=gradients and bool(enabled), autocast=autocast)
        if name == "wrap_with_autocast":
            kind, dtype, enabled, cache, inner, *given = node.args
            within = (kind, dtype, enabled, cache)
            return self._inner(module, inner, given, known, gradients=gradients, autocast=within)
        path = _path(node)
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise Uncapturable(f"{name} is no operator", path)
        if not isinstance(target, torch._ops.OpOverload):
            if name == "getitem":
                source = self._argument(node.args[0], known)
                if isinstance(source, tuple | list):
                    return source[node.args[1]]  # type: ignore[index]
                return self._added("getitem", node, known, path, gradients, autocast)
            return self._size(node, known, value, path)
        text = str(target)
        short = text.split(".")[1]
        if short in _ASSERTIONS:
            return None
        if short.startswith("sym_") or isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float):
            return self._size(node, known, value, path)
        if text.startswith("pipeline.opaque"):
            return self._opaque(node, known, path)
        if short == "slice" and _is_everything(node):
            return self._argument(node.args[0], known)
        if not text.startswith("aten."):
            raise Uncapturable(f"the operator {text} is not one of torch's", path)
        return self._added(text, node, known, path, gradients, autocast)

    def _inner(
        self,
        module: fx.GraphModule,
        inner: Any,
        given: Sequence[Any],
        known: dict[fx.Node, Any],
        *,
        gradients: bool,
        autocast: tuple[Any, ...] | None,
    ) -> tuple[Any, ...]:
        graph = getattr(module, inner.target)
        places = [one for one in graph.graph.nodes if one.op == "placeholder"]
        inside = {place: self._argument(one, known) for place, one in zip(places, given, strict=True)}
        return self._walk(graph, inside, gradients=gradients, autocast=autocast)

    def _added(
        self,
        target: str,
        node: fx.Node,
        known: dict[fx.Node, Any],
        path: str,
        gradients: bool,
        autocast: tuple[Any, ...] | None,
    ) -> Value:
        args = tuple(self._argument(one, known) for one in node.args)
        kwargs = {key: self._argument(one, known) for key, one in node.kwargs.items()}
        made = Node(
            name=self._unique(node.name),
            target=target,
            args=args,
            kwargs=kwargs,
            module=path,
            results=_forms(node.meta.get("val"), path),
            is_tensor=isinstance(node.meta.get("val"), torch.Tensor),
            gradients=gradients,
            autocast=autocast,
        )
        self._nodes.append(_with_any_backend(made))
        return Value(made.name)

    def _opaque(self, node: fx.Node, known: dict[fx.Node, Any], path: str) -> tuple[Value, ...]:
        tensors, numbers, key, call = (self._argument(one, known) for one in node.args)
        record = self._stubs[key]
        args, kwargs = record.arguments(call, tensors, numbers)
        made = Node(
            name=self._unique(record.module.replace(".", "_") or "model"),
            target=f"{MODULE}{record.module}",
            args=args,
            kwargs=kwargs,
            module=path,
            results=_forms(node.meta["val"], path),
            is_tensor=False,
        )
        self._nodes.append(made)
        found = []
        for index, form in enumerate(made.results):
            part = Node(
                name=self._unique(f"{made.name}_{index}" if len(made.results) > 1 else f"{made.name}_output"),
                target="getitem",
                args=(Value(made.name), index),
                kwargs={},
                module=path,
                results=(form,),
                is_tensor=True,
            )
            self._nodes.append(part)
            found.append(Value(part.name))
        return tuple(found)

    def _argument(self, given: Any, known: dict[fx.Node, Any]) -> Any:
        def one(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                return known[leaf]
            if isinstance(leaf, torch.device):
                return Here()
            if isinstance(leaf, torch.SymInt):
                return _extent(leaf, "")
            return leaf

        return mapped(_plain(given), one)

    def _size(self, node: fx.Node, known: dict[fx.Node, Any], value: Any, path: str) -> Any:
        """A number made of shapes."""
        if not isinstance(value, torch.SymInt) and isinstance(value, int | float):
            return value
        if isinstance(value, torch.SymInt):
            linear = _linear(value.node.expr)
            if linear is not None:
                return linear
        name = getattr(node.target, "__name__", str(node.target))
        if not is_size_function(name):
            raise Uncapturable(f"a number made of shapes by {name}", path)
        return Size(name, tuple(self._argument(one, known) for one in node.args))

    def _unique(self, wanted: str) -> str:
        name, count = wanted, 0
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name


def _with_any_backend(node: Node) -> Node:
    """Let an operator use cuDNN where there is one."""
    names = argument_names(node.target)
    args = tuple(
        True if place < len(names) and names[place] in _BACKENDS else one for place, one in enumerate(node.args)
    )
    return replace(node, args=args)


def _is_everything(node: fx.Node) -> bool:
    """Whether a slice is all there is: ``x[:]``."""
    source: Any = node.args[0]
    shapes = [one.meta["val"].shape for one in (source, node)]
    return len(node.args) < 5 and list(map(str, shapes[0])) == list(map(str, shapes[1]))


def _plain(given: Any) -> Any:
    """What fx has keeps lists and dictionaries in types of its own."""
    if isinstance(given, list | tuple):
        return [_plain(one) for one in given] if isinstance(given, list) else tuple(_plain(one) for one in given)
    if isinstance(given, dict):
        return {key: _plain(one) for key, one in given.items()}
    return given


def _path(node: fx.Node) -> str:
    """The innermost submodule in whose ``forward`` a call is."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path = str(stack[-1][0]).partition("@")[0]
    return path.removeprefix("model").removeprefix(".") if path.partition(".")[0] == "model" else ""


def _forms(value: Any, path: str) -> tuple[Form, ...]:
    tensors = value if isinstance(value, list | tuple) else [value]
    return tuple(_form(one, path) for one in tensors if isinstance(one, torch.Tensor))


def _form(tensor: torch.Tensor, path: str = "") -> Form:
    shape = tuple(_extent(one, path) for one in tensor.shape)
    strides = [_hint(one) for one in tensor.stride()]
    order = tuple(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))
    return Form(shape, tensor.dtype, order)


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _extent(size: Any, path: str) -> int | Images:
    if not isinstance(size, torch.SymInt):
        return int(size)
    found = _linear(size.node.expr)
    if found is None:
        raise Uncapturable("a size does not grow evenly with the number of images", path)
    return found


def _linear(expression: Any) -> int | Images | None:
    """A size as a line over the number of images; None if it is none."""
    symbols = list(expression.free_symbols)
    if not symbols:
        return int(expression)
    if isinstance(expression, sympy.Symbol):
        return Images(1)
    if len(symbols) != 1:
        return None
    at = [expression.subs(symbols[0], images) for images in _PROBES]
    if not all(one.is_integer for one in at):
        return None
    first, second, *others = (int(one) for one in at)
    times = second - first
    plus = first - times * _PROBES[0]
    fits = all(value == times * images + plus for value, images in zip(others, _PROBES[2:], strict=True))
    return Images(times, plus) if fits and times else (plus if fits else None)


def _reason(error: BaseException) -> str:
    """The sentence of an error that says most, of the many lines of some."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


_LONGEST = 120
"""Characters of a reason, so that a line holds it."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch logs and prints of exports that fail, of which we tell ourselves."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(_OfOtherThreads(sys.stderr)):
            yield
    finally:
        logging.disable(before)


class _OfOtherThreads:
    """A stream in all but what this thread writes: ``sys.stderr`` is that of others, too, such as a progress bar's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._silent = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._silent else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
