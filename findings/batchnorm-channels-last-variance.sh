#!/usr/bin/env bash
# On a CPU, BatchNorm2d computes the variance of a large float32 batch to three digits only if it is channels_last.
#
# Package:  torch 2.13.0, CPU
# Expected: the variance of 32 planes of 224 x 224 is good to some 1e-6 in either memory format, as the contiguous one
#           is (1e-7).
# Seen:     with channels_last it is off by 1e-3 of itself: squares are added one after the other in float32, without
#           partial sums.
#
# GroupNorm with the channels last errs in the same way, less so. One thread is used here; with more, each adds fewer
# numbers.
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

import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(32, 8, 224, 224)
exact = x.double().var((0, 2, 3))
errors = {}
for order in (torch.contiguous_format, torch.channels_last):
    norm = nn.BatchNorm2d(8, momentum=1.0)  # the running variance is then that of the batch
    norm(x.contiguous(memory_format=order))
    errors[order] = ((norm.running_var.double() - exact) / exact).abs().max().item()
print(f"torch {torch.__version__}, relative error of the variance")
print("expected: below 1e-5 for both")
print("seen:", ", ".join(f"{order} {error:.1e}" for order, error in errors.items()))
sys.exit(0 if errors[torch.contiguous_format] < 1e-5 and errors[torch.channels_last] > 1e-4 else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
