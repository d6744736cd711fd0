"""Along which axes an ATen operator works on each index by itself: the one table of operators.

For every tensor that a call takes, a rule says which of its axes are *kept*: entry ``i`` along such an axis of the
result needs entry ``i`` of the operand only. From that alone follows what can be split: the axis of the images, or that
of the channels, if every operand that has it keeps it. Operators without a rule run on one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeline.graph.nodes import Extent, Form, Images, Node, Value, Weight, leaves, resolved

Axes = Mapping[int, int]
"""By axis of an operand, the axis of the result that it becomes."""


@dataclass(frozen=True)
class Operand:
    """A tensor that a call takes."""

    name: str
    form: Form
    is_weight: bool
    """Whether it is the model's own, and no value of a call, which may have the same name."""


@dataclass(frozen=True)
class Shapes:
    """A call on shapes alone."""

    node: Node
    operands: tuple[Operand, ...]
    result: Form
    """Of the first tensor that it gives."""


def kept_axes(call: Shapes) -> list[Axes] | None:
    """The axes that each operand keeps; None if nothing is known of the operator."""
    rule = _RULES.get(call.node.operator)
    if rule is None and _is_pointwise(call.node):
        rule = _pointwise
    return None if rule is None else rule(call)


def _is_pointwise(node: Node) -> bool:
    return node.target.startswith("aten.") and torch.Tag.pointwise in resolved(node.target).tags  # type: ignore[attr-defined]


def aligned(form: Form, result: Form) -> Axes:
    """The axes of what is broadcast to a result that have its extent there."""
    shift = len(result.shape) - len(form.shape)
    return {
        axis: axis + shift
        for axis, extent in enumerate(form.shape)
        if axis + shift >= 0 and extent == result.shape[axis + shift]
    }


def _pointwise(call: Shapes) -> list[Axes]:
    return [aligned(one.form, call.result) for one in call.operands]


def _all_but(form: Form, dropped: Sequence[int], *, removed: bool = False) -> Axes:
    """All axes but some, which the result has not at all if they are ``removed``."""
    gone = {axis % max(len(form.shape), 1) for axis in dropped}
    found, place = {}, 0
    for axis in range(len(form.shape)):
        if axis not in gone:
            found[axis] = place
        place += axis not in gone or not removed
    return found


def _dims(call: Shapes, name: str = "dim") -> list[int] | None:
    """The axes that an argument names; None for all."""
    given = call.node.argument(name)
    if given is None:
        return None
    return [int(one) for one in given] if isinstance(given, list | tuple) else [int(given)]


def _reduced(call: Shapes) -> list[Axes] | None:
    """Means, sums, extremes and the like."""
    dims = _dims(call)
    if not dims:
        return [{} for _ in call.operands]
    keep = bool(call.node.argument("keepdim", False))
    return [_all_but(one.form, dims, removed=not keep) for one in call.operands]


def _along(default: int | None, name: str = "dim") -> Callable[[Shapes], list[Axes] | None]:
    """What mixes along one axis, or some."""

    def rule(call: Shapes) -> list[Axes] | None:
        dims = _dims(call, name) or ([] if default is None else [default])
        if not dims:
            return [{} for _ in call.operands]
        return [_all_but(one.form, dims) for one in call.operands]

    return rule


def _taken_out(call: Shapes) -> list[Axes]:
    """``select`` and ``unbind``."""
    return [_all_but(one.form, _dims(call) or [0], removed=True) for one in call.operands]


def _stacked(call: Shapes) -> list[Axes]:
    dims = len(call.result.shape)
    place = (_dims(call) or [0])[0] % dims
    return [{axis: axis + (axis >= place) for axis in range(len(one.form.shape))} for one in call.operands]


def _put_in(call: Shapes) -> list[Axes]:
    """``select_scatter``: a tensor and what takes the place of one of its parts."""
    whole, part = call.operands
    place = (_dims(call) or [0])[0] % len(call.result.shape)
    return [
        _all_but(whole.form, [place]),
        {axis: axis + (axis >= place) for axis in range(len(part.form.shape))},
    ]


def _rows(count: int) -> Callable[[Shapes], list[Axes] | None]:
    """What keeps the first axes, of a single operand that has ``count`` further ones."""

    def rule(call: Shapes) -> list[Axes] | None:
        shape = call.operands[0].form.shape
        leading = range(len(shape) - count)
        return [{axis: axis for axis in leading}, *({} for _ in call.operands[1:])]

    return rule


def _first(axes: int) -> Callable[[Shapes], list[Axes] | None]:
    """What keeps the first axes of its first operand and has nothing of the others but weights."""

    def rule(call: Shapes) -> list[Axes] | None:
        return [{axis: axis for axis in range(axes)}, *({} for _ in call.operands[1:])]

    return rule


def _spatial(axes: int) -> Callable[[Shapes], list[Axes] | None]:
    """Pooling, padding and resizing over some axes at the end."""
    return _rows(axes)


def _reordered(call: Shapes) -> list[Axes]:
    form, dims = call.operands[0].form, len(call.result.shape)
    name = call.node.operator
    if name == "permute":
        given = [int(axis) % dims for axis in call.node.argument("dims")]
        return [{axis: given.index(axis) for axis in range(dims)}]
    if name in ("transpose", "swapaxes", "swapdims"):
        one, other = (int(axis) % dims for axis in call.node.args[1:3])
    else:  # t, mT, numpy_T of two axes
        one, other = (0, 1) if dims == 2 else (dims - 2, dims - 1)
    swap = {one: other, other: one}
    return [{axis: swap.get(axis, axis) for axis in range(len(form.shape))}]


def _moved(call: Shapes) -> list[Axes]:
    dims = len(call.result.shape)
    sources = [axis % dims for axis in _dims(call, "source") or []]
    targets = [axis % dims for axis in _dims(call, "destination") or []]
    found = dict(zip(sources, targets, strict=True))
    left = [axis for axis in range(dims) if axis not in targets]
    rest = [axis for axis in range(dims) if axis not in sources]
    return [{**found, **dict(zip(rest, left, strict=True))}]


def _viewed(call: Shapes) -> list[Axes] | None:
    """What keeps all numbers in their order: an axis is kept if as many numbers lie before it and it is as long.

    An axis that holds some entries of each image may become one that holds more or fewer of each.
    """
    if call.node.target == "aten.squeeze.default":
        return None  # of one image it would take away the axis of the images, too
    before, after = call.operands[0].form.shape, call.result.shape
    found = {}
    for axis, extent in enumerate(before):
        for place in range(len(after)):
            if _size(after[:place]) != _size(before[:axis]):
                continue
            grows = isinstance(extent, Images) and isinstance(after[place], Images)
            if after[place] == extent or grows:
                found[axis] = place
                break
    return [found, *({} for _ in call.operands[1:])]


def _size(extents: Sequence[Extent]) -> tuple[int, int]:
    """A product of extents: a number, and how often the number of images is in it."""
    numbers = math.prod(one.times if isinstance(one, Images) else one for one in extents)
    return numbers, sum(isinstance(one, Images) for one in extents)


def _repeated(call: Shapes) -> list[Axes]:
    form = call.operands[0].form
    shift = len(call.result.shape) - len(form.shape)
    return [{axis: axis + shift for axis, one in enumerate(form.shape) if one == call.result.shape[axis + shift]}]


def _padded(call: Shapes) -> list[Axes]:
    pad, form = call.node.argument("pad"), call.operands[0].form
    return [_all_but(form, [-1 - axis for axis in range(len(pad) // 2)])]


def _convolved(call: Shapes) -> list[Axes] | None:
    """The images of a batch; a convolution's channels are seen to elsewhere."""
    image, weight = call.operands[:2]
    if len(image.form.shape) != len(weight.form.shape):
        return None
    return [{0: 0}, *({} for _ in call.operands[1:])]


def _multiplied(call: Shapes) -> list[Axes] | None:
    """``matmul`` and kin: rows of the left, columns of the right, and whatever is before these."""
    one, other = call.operands[-2:]
    dims = len(call.result.shape)
    if min(len(one.form.shape), len(other.form.shape)) < 2:
        return None
    left, right = aligned(one.form, call.result), aligned(other.form, call.result)
    found: list[Axes] = [
        {axis: place for axis, place in left.items() if place < dims - 1 and axis < len(one.form.shape) - 1},
        {axis: place for axis, place in right.items() if place != dims - 2 and axis != len(other.form.shape) - 2},
    ]
    return [aligned(call.operands[0].form, call.result), *found] if len(call.operands) == 3 else found


def _attended(call: Shapes) -> list[Axes] | None:
    """Attention: rows of the queries, and whatever is before the last two axes."""
    query, key, value, *masks = call.operands
    lead = len(call.result.shape) - 2
    if any(len(one.form.shape) != lead + 2 for one in (query, key, value)):
        return None
    batch = {axis: axis for axis in range(lead)}
    if any(one.form.shape[:lead] != call.result.shape[:lead] for one in (query, key, value)):
        return None
    return [{**batch, lead: lead}, batch, batch, *(_before(aligned(one.form, call.result), lead + 1) for one in masks)]


def _before(axes: Axes, end: int) -> Axes:
    return {axis: place for axis, place in axes.items() if place < end}


def _summed_products(call: Shapes) -> list[Axes] | None:
    """``einsum``: an axis is kept if its letter is in the result."""
    equation = str(call.node.args[0]).replace(" ", "")
    if "->" not in equation or "." in equation:
        return None
    terms, result = equation.split("->")
    names = terms.split(",")
    if len(names) != len(call.operands) or len(set(result)) < len(result):
        return None
    return [
        {axis: result.index(letter) for axis, letter in enumerate(term) if letter in result and term.count(letter) == 1}
        for term in names
    ]


def _normalised(call: Shapes) -> list[Axes]:
    """``batch_norm``: by itself each channel; and each image, where it does not go by their statistics."""
    dims = range(len(call.result.shape))
    own = {1: 1} if call.node.argument("training") else {axis: axis for axis in dims}
    return [own, *({0: 1} for _ in call.operands[1:])]


def _instance_normalised(call: Shapes) -> list[Axes] | None:
    if call.node.argument("running_mean") is not None or not call.node.argument("use_input_stats"):
        return None
    return [{0: 0, 1: 1}, *({0: 1} for _ in call.operands[1:])]


def _layer_normalised(call: Shapes) -> list[Axes] | None:
    return _rows(len(call.node.argument("normalized_shape")))(call)


def _weighted_rectified(call: Shapes) -> list[Axes]:
    """``prelu``."""
    image, weight = call.operands
    every = {axis: axis for axis in range(len(image.form.shape))}
    return [every, {0: 1} if weight.form.shape != (1,) else {}]


def _sampled(_: Shapes) -> list[Axes]:
    return [{0: 0, 1: 1}, {0: 0}]


def _looked_up(call: Shapes) -> list[Axes]:
    """``embedding``: a table, and indices of its rows."""
    _, indices = call.operands
    return [{}, {axis: axis for axis in range(len(indices.form.shape))}]


def _indexed(call: Shapes) -> list[Axes] | None:
    """``x[:, i, j]``: the axes before the first index."""
    given = call.node.args[1]
    used = [place for place, one in enumerate(given) if one is not None]
    if used != list(range(used[0], used[-1] + 1)):
        return None  # what indices that lie apart make comes first
    leading = used[0]
    return [{axis: axis for axis in range(leading)}, *({} for _ in call.operands[1:])]


def _gathered(call: Shapes) -> list[Axes]:
    dropped = _dims(call) or [0]

    def as_long(form: Form, axes: Axes) -> Axes:
        return {axis: place for axis, place in axes.items() if form.shape[axis] == call.result.shape[axis]}

    return [as_long(one.form, _all_but(one.form, dropped)) for one in call.operands]


def _unfolded(call: Shapes) -> list[Axes]:
    return [_all_but(call.operands[0].form, [int(call.node.args[1])])]


def _nothing(call: Shapes) -> list[Axes]:
    """What is made of shapes alone."""
    return [{} for _ in call.operands]


Rule = Callable[[Shapes], list[Axes] | None]


def _each(rule: Rule, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


_RULES: dict[str, Rule] = {
    **_each(
        _pointwise, "hardswish", "to", "type_as", "_to_copy", "contiguous", "detach", "alias", "log_sigmoid", "dropout",
        "floor_divide", "alpha_dropout", "expand", "expand_as", "view_as", "lift_fresh_copy", "zeros_like", "relu_",
        "ones_like", "full_like", "empty_like", "float_power", "isclose", "square", "clip", "multiply", "divide",
        "subtract", "negative", "absolute", "softplus", "rrelu", "feature_dropout", "feature_alpha_dropout", "conj",
        "resolve_conj", "resolve_neg", "special_expit", "true_divide",
    ),
    **_each(
        _reduced, "mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "std", "var", "var_mean", "std_mean",
        "prod", "norm", "linalg_vector_norm", "logsumexp", "any", "all", "median", "nansum", "count_nonzero", "aminmax",
    ),
    **_each(
        _along(None), "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp",
        "softmin", "repeat_interleave",
    ),
    **_each(_along(None, "dims"), "flip", "roll"),
    **_each(
        _along(0), "cat", "concat", "concatenate", "chunk", "split", "split_with_sizes", "tensor_split", "slice",
        "narrow", "index_select", "slice_scatter", "unsafe_chunk", "unsafe_split",
    ),
    **_each(_along(-1), "glu", "sort", "topk", "kthvalue", "argsort"),
    **_each(_taken_out, "select", "unbind"),
    "stack": _stacked,
    "select_scatter": _put_in,
    **_each(_reordered, "permute", "transpose", "t", "mT", "numpy_T", "swapaxes", "swapdims"),
    **_each(_moved, "movedim", "moveaxis"),
    **_each(_viewed, "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "ravel"),
    **_each(_repeated, "repeat", "tile"),
    **_each(_padded, "constant_pad_nd", "pad"),
    **_each(
        _spatial(1), "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "reflection_pad1d",
        "replication_pad1d", "upsample_linear1d", "upsample_nearest1d", "_upsample_nearest_exact1d",
    ),
    **_each(
        _spatial(2), "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "reflection_pad2d",
        "replication_pad2d", "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d",
        "max_pool2d_with_indices", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa", "fractional_max_pool2d", "_adaptive_avg_pool2d",
    ),
    **_each(
        _spatial(3), "max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d", "reflection_pad3d",
        "replication_pad3d", "upsample_trilinear3d", "upsample_nearest3d", "max_pool3d_with_indices",
        "_upsample_nearest_exact3d", "pixel_shuffle", "pixel_unshuffle",
    ),
    **_each(_convolved, "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    **_each(_first(1), "channel_shuffle", "native_channel_shuffle", "im2col", "col2im", "affine_grid_generator"),
    **_each(_first(1), "group_norm", "bilinear"),
    "linear": _rows(1),
    **_each(_multiplied, "matmul", "bmm", "mm", "baddbmm", "addmm"),
    "scaled_dot_product_attention": _attended,
    "einsum": _summed_products,
    "batch_norm": _normalised,
    "instance_norm": _instance_normalised,
    **_each(_layer_normalised, "layer_norm", "rms_norm"),
    "prelu": _weighted_rectified,
    **_each(_sampled, "grid_sampler", "grid_sampler_2d", "grid_sampler_3d"),
    "embedding": _looked_up,
    "index": _indexed,
    "gather": _gathered,
    "unfold": _unfolded,
    **_each(_nothing, "new_zeros", "new_ones", "new_full", "new_empty"),
}  # fmt: skip
"""By the name of an operator, what it keeps; beside it, all that torch tags as pointwise."""

SHAPED = {
    "view": "size", "reshape": "shape", "_unsafe_view": "size", "expand": "size", "unflatten": "sizes",
}  # fmt: skip
"""By operator, the argument that says which shape its result has."""


def operands_of(node: Node, forms: Mapping[str, Form], weights: Mapping[str, Form]) -> tuple[Operand, ...]:
    """The tensors that a call takes, in order, each as often as it is taken; the forms of values and of weights."""
    found = []
    for one in leaves((node.args, dict(node.kwargs))):
        known = weights if isinstance(one, Weight) else forms
        if isinstance(one, Value | Weight) and one.name in known:
            found.append(Operand(one.name, known[one.name], isinstance(one, Weight)))
    return tuple(found)
