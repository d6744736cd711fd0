"""A fixed computation that tells how fast a device is at one time beside another time.

Cores of a shared machine become faster and slower as other machines on its host work. The same convolution, timed
beside a calibration and beside a run, says by how much.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from pipeline.cluster.gang import RankContext
from pipeline.run.emulation import Throttle

_IMAGES, _CHANNELS, _SIZE, _KERNEL = 8, 64, 18, 5
_REPETITIONS = 9
"""Some 0.1 s on a CPU core."""


def yardstick_seconds(context: RankContext) -> float:
    """How long a small convolution takes this device forward and backward in s, beside all others of the gang.

    The median of a few; every rank of the gang has to call it. It draws no random numbers.
    """
    work, throttle = _work(context)
    context.barrier()
    return _seconds(context, work, throttle)


def yardstick_alone(context: RankContext) -> float:
    """As ``yardstick_seconds``, while all other ranks wait; every rank of the gang has to call it."""
    work, throttle = _work(context)
    took = 0.0
    for rank in range(context.size):
        context.barrier()
        if rank == context.rank:
            took = _seconds(context, work, throttle)
    context.barrier()
    return took


def _work(context: RankContext) -> tuple[Callable[[], None], Throttle]:
    """What is to be timed, set up and run once."""
    device, throttle = context.torch_device, Throttle(context.device)
    with torch.random.fork_rng(devices=[]):
        layer = nn.Conv2d(_CHANNELS, _CHANNELS, _KERNEL).to(device)
    x_BCHW = torch.full((_IMAGES, _CHANNELS, _SIZE, _SIZE), 0.5, device=device, requires_grad=True)

    def work() -> None:
        with throttle.work():
            layer(x_BCHW).sum().backward()

    work()
    return work, throttle


def _seconds(context: RankContext, work: Callable[[], None], throttle: Throttle) -> float:
    return float(np.median([throttle.busy_time(work, context.torch_device) for _ in range(_REPETITIONS)]))
