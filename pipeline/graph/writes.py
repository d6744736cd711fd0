"""In-place operations become ordinary ones: a segment's input is a leaf of its own, which must not be written to.

What is read after a write reads the result of the ordinary operation; a write to a part of a tensor makes a new tensor
with that part changed, and other views of it are taken anew. Writes to the model's own buffers stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from pipeline.graph.capture import Captured, Uncapturable
from pipeline.graph.nodes import Form, Node, Value, Weight, leaves, mapped, resolved

_FILLS = ("bernoulli_", "uniform_", "normal_", "exponential_", "random_", "log_normal_", "cauchy_", "geometric_")
"""What writes random numbers whatever was there before."""
_SAME_SHAPE = ("alias", "detach", "view_as", "contiguous", "lift_fresh_copy")
_LAST = 2**62


@dataclass(frozen=True)
class _View:
    """A value as seen from the tensor whose memory it is in."""

    root: str
    """Name of the value, or of the weight, that was made first."""
    chain: tuple[Node, ...]
    """The views that lead from it to this one."""


def without_writes(captured: Captured) -> Captured:
    """The same calls, none of which writes to what another one reads, buffers of the model aside.

    Raises ``Uncapturable`` for a write that cannot be told otherwise.
    """
    return _Rewriting(captured).done()


class _Rewriting:
    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._nodes: list[Node] = []
        self._views: dict[str, _View] = {}
        self._own: set[str] = set()
        """Values in the memory of the model's own tensors."""
        self._latest: dict[str, str] = {}
        """By root that was written to, the value that has its place."""
        self._anew: dict[tuple[str, str], str] = {}
        """By a view and the value it is to be taken of, the view taken anew."""
        self._with_gradients: set[str] = set()
        self._names = {one.name for one in captured.nodes} | set(captured.inputs)
        self._forms: dict[str, Form | None] = dict(zip(captured.inputs, captured.forms, strict=True))

    def done(self) -> Captured:
        for node in self._captured.nodes:
            self._take(node)
        returned = mapped(self._captured.returned, self._current)
        return replace(self._captured, nodes=tuple(_used(self._nodes, returned)), returned=returned)

    def _take(self, node: Node) -> None:
        now = node.mapped(self._current)
        written, shared = _effects(node.target)
        if written:
            self._write(now, written)
            return
        self._add(now)
        if shared and now.args and isinstance(now.args[0], Value | Weight):
            self._shares(now, now.args[0])

    def _add(self, node: Node) -> None:
        self._nodes.append(node)
        if node.gradients:
            self._with_gradients.add(node.name)
        self._forms[node.name] = node.form

    def _shares(self, node: Node, source: Value | Weight) -> None:
        """Note that a result is in the memory of what the call takes."""
        if isinstance(source, Weight):
            self._own.add(node.name)
            self._views[node.name] = _View(source.name, ())
            return
        if source.name in self._own:
            self._own.add(node.name)
            self._views[node.name] = self._views[source.name]
            return
        seen = self._views.get(source.name, _View(source.name, ()))
        self._views[node.name] = _View(seen.root, (*seen.chain, node))

    def _current(self, leaf: Any) -> Any:
        """What a value is by now."""
        if not isinstance(leaf, Value) or leaf.name in self._own:
            return leaf
        view = self._views.get(leaf.name, _View(leaf.name, ()))
        latest = self._newest(view.root)
        if latest == view.root:
            return leaf
        return Value(self._again(leaf.name, view.chain, latest))

    def _newest(self, root: str) -> str:
        while root in self._latest:
            root = self._latest[root]
        return root

    def _again(self, name: str, chain: Sequence[Node], source: str) -> str:
        """A view of what has taken the place of its root."""
        if not chain:
            return source
        if (name, source) not in self._anew:
            *before, last = chain
            base = self._again(before[-1].name if before else "", before, source)
            made = replace(last, name=self._unique(last.name), args=(Value(base), *last.args[1:]))
            self._add(made)
            view = self._views.get(base, _View(base, ()))
            self._views[made.name] = _View(view.root, (*view.chain, made))
            self._anew[name, source] = made.name
        return self._anew[name, source]

    def _write(self, node: Node, written: Sequence[str]) -> None:
        target = node.argument(written[0])
        if len(written) > 1 or not isinstance(target, Value | Weight):
            raise Uncapturable(f"{node.target} writes to several tensors", node.module)
        if isinstance(target, Weight) or target.name in self._own:
            self._write_own(node, target)
            return
        if "out" in node.kwargs:
            raise Uncapturable(f"{node.target} writes to a tensor beside its arguments", node.module)
        if not node.gradients and target.name in self._with_gradients:
            raise Uncapturable("a write under torch.no_grad(), which leaves gradients as they were", node.module)
        view = self._views.get(target.name, _View(target.name, ()))
        if node.operator == "copy_":
            ordinary = self._copied(node, target)
        elif node.operator in _FILLS:
            ordinary = self._filled(node, target)
        else:
            ordinary = _ordinary(node)
        self._add(ordinary)
        result = ordinary.name
        for step in reversed(view.chain):
            result = self._scattered(step, result, node)
        self._latest[view.root] = result
        if view.chain:  # the result is a tensor of its own, which what follows reads as the view
            self._views[ordinary.name] = _View(result, view.chain)
        else:
            self._views.pop(ordinary.name, None)

    def _write_own(self, node: Node, target: Value | Weight) -> None:
        name = target.name if isinstance(target, Weight) else self._views[target.name].root
        source = node.args[1] if len(node.args) > 1 else None
        if node.operator == "copy_" and isinstance(source, Value) and source.name in self._own:
            same = self._views[source.name]
            if same.root == name and isinstance(target, Weight):
                return  # an export ends so for a buffer that was written to in place
        self._add(replace(node, writes=(name,)))
        self._own.add(node.name)
        self._views[node.name] = _View(name, ())

    def _filled(self, node: Node, target: Value) -> Node:
        """Random numbers for a tensor that nothing else is in the memory of."""
        form = self._forms[target.name]
        assert form is not None
        empty = self._made(node, "aten.empty_like.default", (target,), form)
        return replace(node, args=(empty, *node.args[1:]))

    def _copied(self, node: Node, target: Value) -> Node:
        """``x.copy_(y)``: y, as wide as x and of its type."""
        form = self._forms[target.name]
        assert form is not None
        source = node.args[1]
        given = self._forms.get(source.name) if isinstance(source, Value) else None
        if given is not None and given.shape == form.shape and given.dtype == form.dtype:
            return replace(node, target="aten.clone.default", args=(source,), kwargs={})
        zero = self._made(node, "aten.mul.Scalar", (target, 0), form)
        filled = self._made(node, "aten.expand_as.default", (source, zero), form)
        return replace(node, target="aten.to.dtype", args=(filled, form.dtype, False, True), kwargs={})

    def _made(self, like: Node, target: str, args: tuple[Any, ...], form: Form) -> Value:
        made = replace(
            like, name=self._unique(f"{like.name}_part"), target=target, args=args, kwargs={}, results=(form,),
            is_tensor=True, in_place="", writes=(),
        )  # fmt: skip
        self._add(made)
        return Value(made.name)

    def _scattered(self, step: Node, changed: str, write: Node) -> str:
        """What ``step`` is a view of, with that view changed."""
        source = step.args[0]
        assert isinstance(source, Value)
        form = self._forms[source.name]
        if form is None:
            raise Uncapturable(f"{write.operator} writes to one of several parts of a tensor", write.module)
        if step.operator in _SAME_SHAPE or _is_everything(step, form):
            return changed
        if step.operator in ("slice", "select", "diagonal"):
            target = {
                "slice": "aten.slice_scatter.default",
                "select": "aten.select_scatter.default",
                "diagonal": "aten.diagonal_scatter.default",
            }[step.operator]
            return self._made(write, target, (source, Value(changed), *step.args[1:]), form).name
        if step.operator in ("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"):
            return self._made(write, "aten.reshape.default", (Value(changed), list(form.shape)), form).name
        if step.operator in ("transpose", "t"):
            swapped = step.args[1:] or (0, 1)
            return self._made(write, "aten.transpose.int", (Value(changed), *swapped), form).name
        if step.operator == "permute":
            axes = [axis % len(form.shape) for axis in step.args[1]]
            back = [axes.index(axis) for axis in range(len(axes))]
            return self._made(write, "aten.permute.default", (Value(changed), back), form).name
        raise Uncapturable(f"{write.operator} writes to a part of a tensor by {step.operator}", write.module)

    def _unique(self, wanted: str) -> str:
        count, name = 0, wanted
        while name in self._names:
            count += 1
            name = f"{wanted}_again{count if count > 1 else ''}"
        self._names.add(name)
        return name


@lru_cache(maxsize=4096)
def _effects(target: str) -> tuple[tuple[str, ...], bool]:
    """The names of the arguments that are written to; and whether the result is in the first one's memory."""
    if not target.startswith("aten."):
        return (), target == "getitem"
    schema = resolved(target)._schema  # type: ignore[attr-defined]
    written = tuple(one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write)
    shared = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.arguments[:1])
    if target.startswith("aten.batch_norm") or "native_batch_norm" in target:
        return (), False
    return written, shared


def _is_everything(step: Node, form: Form) -> bool:
    """Whether a slice is all there is along its axis."""
    if step.operator != "slice":
        return False
    axis, start, end, stride = (step.argument(name, default) for name, default in _SLICE)
    extent = form.shape[axis % len(form.shape)]
    whole = end is None or end == extent or (isinstance(end, int) and end > _LAST)
    return start in (0, None) and whole and stride == 1


_SLICE = (("dim", 0), ("start", None), ("end", None), ("step", 1))


def _ordinary(node: Node) -> Node:
    """The call that gives what an in-place one would write."""
    packet, overload = node.target.split(".")[1:3]
    if packet == "copy_":
        return node
    plain = packet[:-1] if packet.endswith("_") and not packet.endswith("__") else ""
    name = f"aten.{plain}.{overload}"
    known = getattr(torch.ops.aten, plain, None) if plain else None
    if known is None or overload not in known.overloads():
        if packet == "fill_" and overload == "Scalar":
            return replace(node, target="aten.full_like.default", in_place="")
        if packet == "zero_":
            return replace(node, target="aten.zeros_like.default", in_place="")
        raise Uncapturable(f"{node.target} has no form that does not write", node.module)
    return replace(node, target=name, in_place=node.target)


def _used(nodes: Sequence[Node], returned: Any) -> list[Node]:
    """Without the calls whose results nobody takes, unless they write or draw random numbers."""
    wanted = {leaf.name for leaf in leaves(returned) if isinstance(leaf, Value)}
    kept = []
    for node in reversed(nodes):
        if node.name in wanted or node.writes or node.submodule is not None or draws(node) or _keeps_statistics(node):
            wanted.update(node.values)
            kept.append(node)
    return kept[::-1]


def _keeps_statistics(node: Node) -> bool:
    """Whether a call of BatchNorm or the like updates running statistics."""
    going_by = node.argument("training") or node.argument("use_input_stats")
    return node.operator in ("batch_norm", "instance_norm") and bool(going_by and node.argument("running_mean"))


def draws(node: Node) -> bool:
    """Whether torch says that an operator draws random numbers, in training mode and with a chance above 0."""
    if not node.target.startswith("aten."):
        return False
    tags = resolved(node.target).tags  # type: ignore[attr-defined]
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    if "dropout" in node.operator:
        return bool(node.argument("train", True)) and node.argument("p", 0.5) != 0
    if node.operator == "scaled_dot_product_attention":
        return bool(node.argument("dropout_p", 0.0) != 0)
    return True
