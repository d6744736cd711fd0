"""What each call does to a layout: where the images and the channels go, and what of it can be split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.graph.axes import Axes, Operand, Shapes, kept_axes, operands_of
from pipeline.graph.effects import Effect
from pipeline.graph.nodes import Form, Images, Node
from pipeline.graph.operations import Cut, Noise

CONVOLUTIONS = {f"conv{transposed}{axes}d": bool(transposed) for transposed in ("", "_transpose") for axes in (1, 2, 3)}
"""By the name of the operator, whether the convolution is transposed."""
DROPOUTS = {
    "dropout": ("element", False), "feature_dropout": ("channel", False), "alpha_dropout": ("element", True),
    "feature_alpha_dropout": ("channel", True),
}  # fmt: skip
"""By the name of the operator, what one draw decides, and whether it is alpha dropout."""

_VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "ravel")
_SIZED = ("expand", "repeat")


@dataclass(frozen=True)
class Place:
    """Where the images and the channels are in a value."""

    images: int | None
    """Axis of the images; None if it has none, or mixes them."""
    per_image: int
    """Entries along it for each image."""
    channels: int
    travels: bool
    """Whether layouts suit it: images along axis 0, one entry each, and at least one more axis."""


NOWHERE = Place(None, 0, 1, travels=False)


@dataclass(frozen=True)
class Judgement:
    """What is known of one call."""

    effect: Effect
    place: Place
    unit: int = 1
    input_unit: int = 1
    noise: Noise | None = None
    cuts: Mapping[str, Cut] | None = None
    axes: Mapping[str, tuple[int | None, int | None]] | None = None
    """By weight that is taken as it is, the axes that go with the output's and the input's channels."""


@dataclass(frozen=True)
class Dependence:
    """What the values of a captured model depend on."""

    varying: frozenset[str]
    """Those that depend on images."""
    touched: frozenset[str]
    """Those that do not, but on buffers that are written to."""
    written: frozenset[str]
    """The buffers that are written to, batch counters aside."""
    drawing: frozenset[str]
    """The calls that draw random numbers."""
    in_order: bool
    """Whether random numbers have to be drawn as the calls come, by one device."""


class Judge:
    """Judges the calls of a captured model, one after the other."""

    def __init__(
        self,
        nodes: Mapping[str, Node],
        forms: Mapping[str, Form],
        weights: Mapping[str, Form],
        dependence: Dependence,
    ) -> None:
        """``forms`` are those of all values, ``weights`` those of parameters, buffers and constants."""
        self._nodes, self._forms, self._weights = nodes, forms, weights
        self._varying, self._touched, self._written = dependence.varying, dependence.touched, dependence.written
        self._drawing, self._in_order = dependence.drawing, dependence.in_order
        self.places: dict[str, Place] = {}
        """By value, where its images and channels are."""

    def judge(self, node: Node) -> Judgement:
        """What is known of a call, whose values have been judged before it."""
        whole = Judgement(Effect.WHOLE, self._place_of_whole(node))
        if node.submodule is not None or node.autocast is not None or node.writes or not node.results:
            return whole
        if node.name not in self._varying or any(name in self._touched for name in node.values):
            return whole
        if any(name in self._written for name in node.weights):
            return whole
        if node.name in self._drawing and self._in_order:
            return whole
        if node.target == "getitem":
            return self._item(node)
        operands = operands_of(node, self._forms, self._weights)
        call = Shapes(node, operands, node.results[0])
        kept = kept_axes(call)
        if kept is None:
            return whole
        if node.operator == "batch_norm" and node.argument("training"):
            return self._batch_norm(call) or whole
        images = self._images_of(call, kept)
        if images is None:
            return whole
        if node.operator in CONVOLUTIONS or node.operator == "linear":
            return self._kernel(call, images)
        return self._by_channels(call, kept, images)

    def _varies(self, operand: Operand) -> bool:
        return not operand.is_weight and operand.name in self._varying

    def _place_of_whole(self, node: Node) -> Place:
        return place_of(node.form) if node.form is not None else NOWHERE

    def _item(self, node: Node) -> Judgement:
        """One of several results."""
        source = self._nodes.get(node.values[0])
        place = self.places[node.values[0]]
        if source is None or place.images is None or node.form is None:
            return Judgement(Effect.WHOLE, self._place_of_whole(node))
        return Judgement(Effect.IMAGEWISE, self._placed(node.form, place.images, place.per_image, place.channels))

    def _images_of(self, call: Shapes, kept: Sequence[Axes]) -> tuple[int, int] | None:
        """The axis of the images in the result, and its entries for each; None where images are mixed."""
        found: set[tuple[int, int]] = set()
        for operand, axes in zip(call.operands, kept, strict=True):
            if not self._varies(operand):
                continue
            place = self.places[operand.name]
            axis = None if place.images is None else axes.get(place.images)
            if axis is None:
                return None
            extent = call.result.shape[axis]
            if (
                not isinstance(extent, Images)
                or extent.plus
                or sum(isinstance(e, Images) for e in call.result.shape) > 1
            ):
                return None
            same = extent == operand.form.shape[place.images]  # type: ignore[index]
            if not same and call.node.operator not in _VIEWS:
                return None
            found.add((axis, extent.times))
        if len(found) != 1:
            return None
        (image,) = found
        for operand, axes in zip(call.operands, kept, strict=True):
            # What is made of sizes may be as long as there are images, but then along that axis.
            long = [axis for axis, extent in enumerate(operand.form.shape) if isinstance(extent, Images)]
            if not self._varies(operand) and any(axes.get(axis) != image[0] for axis in long):
                return None
        return image

    def _kernel(self, call: Shapes, images: tuple[int, int]) -> Judgement:
        node = call.node
        source = call.operands[0]
        place = self.places[source.name]
        linear = node.operator == "linear"
        axis = len(call.result.shape) - 1 if linear else 1
        target = self._placed(call.result, *images, axis)
        imagewise = Judgement(Effect.IMAGEWISE, target)
        alone = [one.name for one in call.operands if self._varies(one)] == [source.name]
        if not alone or not place.travels or not target.travels or place.channels != axis:
            return imagewise
        transposed, groups = CONVOLUTIONS.get(node.operator, False), int(node.argument("groups", 1))
        width = int(call.result.shape[axis])  # type: ignore[arg-type]
        inside = int(source.form.shape[axis])  # type: ignore[arg-type]
        if groups > 1 and transposed and width != inside:
            return imagewise
        rows: tuple[int | None, int | None] = (1, 0) if transposed and groups == 1 else (0, 1)
        if groups > 1:
            rows = (0, None)  # both axes of a group's weights belong to the group
        axes: dict[str, tuple[int | None, int | None]] = {}
        cuts = {}
        for operand, (own, of_input) in zip(call.operands[1:], (rows, (0, None)), strict=False):
            if operand.is_weight:
                axes[operand.name] = (own, of_input)
            else:
                cuts[f"own {operand.name}"] = Cut(channels=own, inputs=of_input)
        return Judgement(
            Effect.KERNEL if groups == 1 else Effect.GROUPED,
            target,
            unit=1 if groups == 1 else width // groups,
            input_unit=1 if groups == 1 else inside // groups,
            cuts=cuts,
            axes=axes,
        )

    def _batch_norm(self, call: Shapes) -> Judgement | None:
        source, *others = call.operands
        place = self.places[source.name]
        if not place.travels or place.channels != 1 or any(not one.is_weight for one in others):
            return None
        if call.node.argument("running_mean") is not None and not isinstance(call.node.argument("momentum"), float):
            return None
        axes: dict[str, tuple[int | None, int | None]] = {one.name: (0, None) for one in others}
        return Judgement(Effect.BATCHNORM, place, axes=axes)

    def _by_channels(self, call: Shapes, kept: Sequence[Axes], images: tuple[int, int]) -> Judgement:
        """What treats images by themselves: does it treat channels so, too?"""
        node = call.node
        varying = [
            (operand, axes, self.places[operand.name])
            for operand, axes in zip(call.operands, kept, strict=True)
            if self._varies(operand)
        ]
        ends = {axes.get(place.channels) for _, axes, place in varying}
        axis = next(iter(ends)) if len(ends) == 1 else None
        target = self._placed(call.result, *images, axis if axis is not None else self._likely(call, varying))
        cuts = self._cuts(call, kept, images[0], None)
        noise = self._noise(node, target)
        imagewise = Judgement(Effect.IMAGEWISE, target, noise=noise, cuts=cuts)
        if not target.travels or not all(place.travels for _, _, place in varying) or not node.is_tensor:
            return imagewise
        if self._is_flattening(call, varying):
            return Judgement(Effect.FLATTEN, replace(target, channels=1))
        if node.operator == "group_norm" and varying[0][2].channels == 1:
            width = int(call.result.shape[1]) // int(node.argument("num_groups"))  # type: ignore[arg-type]
            axes: dict[str, tuple[int | None, int | None]] = {
                one.name: (0, None) for one in call.operands[1:] if one.is_weight
            }
            if len(axes) < len(call.operands) - 1:
                return imagewise
            return Judgement(Effect.CHANNELWISE, replace(target, channels=1), unit=width, input_unit=width, axes=axes)
        if axis is None or axis == images[0]:
            return imagewise
        extent = call.result.shape[axis]
        if any(operand.form.shape[place.channels] != extent for operand, _, place in varying):
            return imagewise
        if noise is not None and noise.per == "channel" and axis != 1:
            return imagewise
        if node.operator in ("new_zeros", "repeat") or (node.operator in _SIZED and not node.is_tensor):
            return imagewise
        own = {}
        for operand, axes_kept in zip(call.operands, kept, strict=True):
            if operand.is_weight:
                along = [mine for mine, place in axes_kept.items() if place == axis]
                whole = operand.form.shape[along[0]] == extent if along else False
                own[operand.name] = (along[0] if along and whole and extent != 1 else None, None)
        cuts = self._cuts(call, kept, images[0], axis)
        return Judgement(Effect.CHANNELWISE, target, noise=noise, cuts=cuts, axes=own)

    def _cuts(self, call: Shapes, kept: Sequence[Axes], images: int, channels: int | None) -> dict[str, Cut]:
        """How what is made of weights and sizes alone is cut, where it is as long as the result."""
        found = {}
        for operand, axes in zip(call.operands, kept, strict=True):
            if self._varies(operand) or operand.is_weight:
                continue
            along_images = next((mine for mine, place in axes.items() if place == images), None)
            if along_images is not None and not isinstance(operand.form.shape[along_images], Images):
                along_images = None
            along = next((mine for mine, place in axes.items() if channels is not None and place == channels), None)
            if along is not None and operand.form.shape[along] == 1:
                along = None
            found[f"own {operand.name}"] = Cut(images=along_images, channels=along)
        return found

    def _likely(self, call: Shapes, varying: Sequence[tuple[Operand, Axes, Place]]) -> int:
        """The axis to take for the channels where they are mixed: where they would have been, or axis 1."""
        ends = (axes.get(place.channels) for _, axes, place in varying)
        stays = (place.channels for operand, _, place in varying if operand.form.shape == call.result.shape)
        return next((axis for axis in (*ends, *stays) if axis), 1)

    def _is_flattening(self, call: Shapes, varying: Sequence[tuple[Operand, Axes, Place]]) -> bool:
        """``(B, C, H, W)`` to ``(B, C * H * W)``."""
        if call.node.operator not in ("view", "reshape", "flatten", "_unsafe_view") or len(call.result.shape) != 2:
            return False
        operand, _, place = varying[0]
        shape = operand.form.shape
        return place.channels == 1 and math.prod(_integers(shape[1:])) == call.result.shape[1] != shape[1]

    def _noise(self, node: Node, target: Place) -> Noise | None:
        if node.operator not in DROPOUTS or node.name not in self._drawing:
            return None
        per, alpha = DROPOUTS[node.operator]
        form = self._forms[node.values[0]]
        folded: tuple[int, ...] = ()
        if not target.travels:
            folded = tuple(one.times if isinstance(one, Images) else one for one in form.shape)
        order = form.order if per == "element" else ()
        return Noise(per, float(node.argument("p")), alpha=alpha, order=order, folded=folded)

    def _placed(self, form: Form, images: int, per_image: int, channels: int) -> Place:
        travels = images == 0 and per_image == 1 and len(form.shape) >= 2
        return Place(images, per_image, channels if len(form.shape) > channels else 1, travels=travels)


def place_of(form: Form) -> Place:
    """Of an input, or of what one device makes of all images."""
    first = form.shape[0] if form.shape else None
    rest = all(not isinstance(one, Images) for one in form.shape[1:])
    if first == Images(1) and rest and len(form.shape) >= 2:
        return Place(0, 1, 1, travels=True)
    return NOWHERE


def _integers(extents: Sequence[object]) -> tuple[int, ...]:
    return tuple(int(one) for one in extents)  # type: ignore[call-overload]
