#!/usr/bin/env bash
# A DTensor convolution whose kernels are sharded gives each rank a part of the output and calls it the whole.
#
# Package:  torch 2.13.0 (torch.distributed.tensor), gloo, two processes
# Expected: F.conv2d(x, w) with x replicated and w as Shard(0), its kernels, has all kernels' feature maps, as with
#           Replicate(), or is refused.
# Seen:     the result is placed as Replicate(), but has the kernels of one rank only: another tensor on each rank, and
#           of half the shape. No error, no warning.
#
# pytorch/pytorch#186129 tells the same of depthwise convolutions.
#
# Exit: 0 if it still is as seen here, 1 if it has changed, 2 if it could not be tried. README.md tells the rest.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
    python3 -m venv "$folder/venv" || exit 2
    "$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.6' || exit 2
fi

cat >"$folder/finding.py" <<'PY'
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn import functional as F


def rank(number, store, results):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=2, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, w = torch.randn(4, 3, 8, 8), torch.randn(6, 3, 3, 3)
    y = F.conv2d(distribute_tensor(x, mesh, [Replicate()]), distribute_tensor(w, mesh, [Shard(0)]), padding=1)
    torch.save((str(y.placements), y.full_tensor(), F.conv2d(x, w, padding=1)), f"{results}.{number}")
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = tempfile.mkdtemp()
    mp.spawn(rank, (f"{folder}/store", f"{folder}/result"), nprocs=2)
    (placed, first, whole), (_, second, _) = (torch.load(f"{folder}/result.{number}") for number in range(2))
    print(f"torch {torch.__version__}")
    print(f"expected: shape {tuple(whole.shape)}, the same on both ranks")
    print(f"seen: placements {placed}, shape {tuple(first.shape)} and {tuple(second.shape)}")
    halves = first.shape == second.shape == whole[:, :3].shape and torch.allclose(
        torch.cat([first, second], 1), whole, atol=1e-5
    )
    print("seen: rank 0 holds kernels 0 to 2, rank 1 kernels 3 to 5" if halves else "seen: something else")
    sys.exit(0 if halves and "Replicate" in placed else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
