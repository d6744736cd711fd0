#!/usr/bin/env bash
# A checkpointed BatchNorm moves its running statistics twice a step.
#
# Package:  torch 2.13.0 (torch.utils.checkpoint)
# Expected: checkpoint(layer, x) trades time for memory and leaves the trained network as it is; it restores the random
#           numbers when it computes again.
# Seen:     the second computation updates the running mean, the running variance and num_batches_tracked again, in both
#           modes (use_reentrant).
#
# The loss of the training is the same; what eval() uses is not: the momentum is in effect 1 - 0.9**2 instead of 0.1.
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
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)
x = torch.randn(16, 2, 4, 4) + 1
plain = nn.BatchNorm2d(2)
plain(x.clone().requires_grad_()).sum().backward()
print(f"torch {torch.__version__}, one step")
print(f"expected: {plain.num_batches_tracked} batch, running mean {plain.running_mean.tolist()}")
twice = []
for reentrant in (True, False):
    norm = nn.BatchNorm2d(2)
    checkpoint(norm, x.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    print(f"seen: {norm.num_batches_tracked} batches, {norm.running_mean.tolist()} (use_reentrant={reentrant})")
    twice.append(norm.num_batches_tracked == 2 and torch.allclose(norm.running_mean, 1.9 * plain.running_mean))
sys.exit(0 if all(twice) else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
