"""How often cells of the timing grid are timed: of use to the clock and, before anything runs, to who foretells it."""

from __future__ import annotations

MOST_STEPS = 40
"""Of one cell, unless more repetitions are asked for."""
LONG_STEP_S = 2.0
"""Where all steps are longer, one round has to do: each spans the host's other work, and more would take long."""


def rounds_of(shortest_s: float, rounds: int, repetitions: int) -> int:
    """In how many rounds that are asked for cells are timed whose shortest step takes so long; each has a step."""
    return 1 if shortest_s > LONG_STEP_S else min(rounds, repetitions)
