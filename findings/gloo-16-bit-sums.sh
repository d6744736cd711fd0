#!/usr/bin/env bash
# The sum of equal 16-bit tensors over gloo has unequal elements: all_reduce rounds after each addition.
#
# Package:  torch 2.13.0 (torch.distributed with gloo), three processes
# Expected: all_reduce of bfloat16 tensors full of 256, 1 and 1 gives 258, which bfloat16 can represent, or at least one
#           number throughout.
# Seen:     some elements are 258 and some 256: each addition is rounded to bfloat16, and the order of the ranks depends
#           on where in the tensor an element lies. float16 likewise.
#
# So the sum of a gradient depends on its place in the message, and on how many messages it is cut into. In float32 the
# sum is right.
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

RANKS = 3
LARGE = {torch.bfloat16: 256.0, torch.float16: 2048.0, torch.float32: 256.0}  # adding 1 rounds to it, 2 does not


def rank(number, store, results):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    sums = {}
    for dtype, large in LARGE.items():
        tensor = torch.full((1024,), large if number == 0 else 1.0, dtype=dtype)
        dist.all_reduce(tensor)
        sums[dtype] = tensor
    if number == 0:
        torch.save(sums, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    folder = tempfile.mkdtemp()
    mp.spawn(rank, (f"{folder}/store", f"{folder}/sums"), nprocs=RANKS)
    sums = {dtype: tensor.float().unique().tolist() for dtype, tensor in torch.load(f"{folder}/sums").items()}
    print(f"torch {torch.__version__}, {RANKS} ranks")
    for dtype, large in LARGE.items():
        print(f"{dtype}: expected [{large + 2}], seen {sums[dtype]}")
    uneven = all(len(sums[dtype]) > 1 for dtype in (torch.bfloat16, torch.float16))
    sys.exit(0 if uneven and sums[torch.float32] == [258.0] else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
