"""Models without weights, whose times are those of any weights."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping

import cloudpickle
from torch import nn

from pipeline.calibration.passes import initialise
from pipeline.graph.copies import copied
from pipeline.graph.operations import Graph
from pipeline.run.parts import Parts, made_up


def skeleton_of(module: nn.Module) -> bytes | None:
    """A module on the meta device, made to travel; None of one that cannot."""
    try:
        return bytes(cloudpickle.dumps(copied(module).to("meta")))
    except Exception:  # noqa: BLE001 - what it holds may be anything, and a run will tell
        return None


def module_of(skeleton: bytes) -> nn.Module:
    """A module with some weights."""
    module: nn.Module = pickle.load(io.BytesIO(skeleton))
    module = module.to_empty(device="cpu")
    initialise((*module.parameters(), *module.buffers()))
    return module


def parts_with_some_weights(graph: Graph, skeletons: Mapping[str, bytes | None]) -> Parts:
    """What a graph needs of its model, with some weights."""
    parts = made_up(graph, {name: module_of(one) for name, one in skeletons.items() if one is not None})
    initialise(parts.tensors.values())
    return parts
