"""The same training step without this package's machinery: what `single` is held against."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch
from torch import nn

from pipeline.errors import RunError
from pipeline.run.recipe import OptimizerFactory


def plain_step_times(
    model: nn.Module,
    x_BCHW: torch.Tensor,
    y_B: torch.Tensor,
    optimizer: OptimizerFactory,
    *,
    threads: int = 1,
    warmup: int = 2,
    repetitions: int = 5,
) -> list[float]:
    """Seconds of each training step on one batch, in an ordinary torch loop on the CPU in a process of its own.

    Raises:
        RunError: The process was lost, as when memory ran out.
    """
    arguments = (model, x_BCHW, y_B, optimizer, threads, warmup, repetitions)
    # The variable is read when torch is loaded, so the new process has to find it there.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_train, *arguments).result()
    except BrokenProcessPool as error:
        raise RunError("the process of the plain torch loop was lost; was there too little memory?") from error
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _train(
    model: nn.Module,
    x_BCHW: torch.Tensor,
    y_B: torch.Tensor,
    optimizer: OptimizerFactory,
    threads: int,
    warmup: int,
    repetitions: int,
) -> list[float]:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    update = optimizer(model.parameters())
    loss = nn.CrossEntropyLoss()
    times = []
    for _ in range(warmup + repetitions):
        start = time.perf_counter()
        update.zero_grad()
        loss(model(x_BCHW), y_B).backward()
        update.step()
        times.append(time.perf_counter() - start)
    return times[warmup:]
