"""What worker processes on this machine need, loaded once for all of them: they are forked from a process with it.

Each by itself would take seconds for that, which are minutes of a study on few cores.
"""

from __future__ import annotations

import gc

import distributed.nanny  # noqa: F401 - a worker begins in there
import torch

# The first use of each loads a good part of torch.
torch.nn.Linear(1, 1, device="meta").to_empty(device="cpu")
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

gc.freeze()  # what is shared stays shared only as long as nobody looks through it
