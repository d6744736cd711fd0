"""The instructions of a step in words: what timelines, measured or simulated, are labelled with."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.graph.operations import Graph
from pipeline.plan.instructions import Compute, Exchange, Instruction
from pipeline.plan.plan import Plan
from pipeline.plan.program import compile_program


class InstructionLabel(NamedTuple):
    """An instruction in words."""

    name: str
    kind: str
    """``compute``, ``exchange`` or ``update``."""
    phase: str
    """``forward``, ``backward`` or ``update``."""
    elements: int
    """Numbers that travel between ranks."""
    master_elements: int = 0
    """Of these, the ones that the master sends or receives."""


DDP_LABELS = (
    InstructionLabel("forward", "compute", "forward", 0),
    InstructionLabel("backward", "compute", "backward", 0),
    InstructionLabel("update", "update", "update", 0),
)
"""What a step of ``ddp`` consists of; its all-reduce runs within the backward pass."""


def instruction_labels(graph: Graph, plan: Plan, batch_size: int) -> list[InstructionLabel]:
    """The instructions of one step of ``plan`` in order."""
    if plan.strategy == "ddp":
        return list(DDP_LABELS)
    return [label_of(one) for one in compile_program(graph, plan, batch_size).instructions]


def label_of(instruction: Instruction) -> InstructionLabel:
    """One instruction in words."""
    if isinstance(instruction, Exchange):
        return InstructionLabel(
            instruction.name, "exchange", instruction.direction, instruction.elements, instruction.master_elements
        )
    if isinstance(instruction, Compute):
        return InstructionLabel(instruction.name, "compute", instruction.direction, 0)
    return InstructionLabel(instruction.name, "update", "update", 0)
