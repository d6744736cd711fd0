"""What worker processes on this machine need, loaded once for all of them: they are forked from a process with it.

Each by itself would take seconds for that, which are minutes of a study on few cores.
"""

from __future__ import annotations

import gc
import os
import signal

# Nothing here may use a GPU, of which forked processes could make nothing; and Ctrl-C is for the driver alone, whatever
# process or thread has started this one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

import distributed.nanny  # noqa: E402, F401 - a worker begins in there
import torch  # noqa: E402

# The first use of each loads a good part of torch.
torch.nn.Linear(1, 1, device="meta").to_empty(device="cpu")
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

gc.freeze()  # what is shared stays shared only as long as nobody looks through it
