"""How much of a step is convolution: a timer around every convolution that torch runs, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_CONVOLUTIONS = frozenset({torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default})


class ConvolutionTimer(TorchDispatchMode):
    """Sums the time of all convolutions within its ``with`` block.

    It sees the operators below autograd, so the backward ones too, and costs some microseconds an operator. On a GPU
    each convolution is waited for. The kineto profiler would do as well, were it not for its noise outside of the main
    thread.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        # With one thread the operators run in the caller, and its processor time leaves out what others took from it.
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.thread_time if alone else time.perf_counter
        self.seconds = 0.0
        """Time in convolutions so far, in s."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and add its time if it is a convolution."""
        if func not in _CONVOLUTIONS:
            return func(*args, **(kwargs or {}))
        self._synchronise()
        start = self._clock()
        result = func(*args, **(kwargs or {}))
        self._synchronise()
        self.seconds += self._clock() - start
        return result

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
