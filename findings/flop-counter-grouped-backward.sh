#!/usr/bin/env bash
# FlopCounterMode counts the backward pass of a grouped convolution too high, of a depthwise one by about half its
# channels.
#
# Package:  torch 2.13.0 (torch.utils.flop_counter)
# Expected: the backward pass of a convolution takes twice the operations of the forward pass: as many for the weights
#           as for the input.
# Seen:     with g groups it is counted as g + 1 times the forward pass: the gradient of the weights is taken for that
#           of a convolution without groups. 17 times for 16 channels, each a group.
#
# pytorch/pytorch#183405 is about the same.
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
from torch.utils.flop_counter import FlopCounterMode

ratios = {}
for groups in (1, 4, 16):
    layer = nn.Conv2d(16, 16, 3, groups=groups, bias=False)
    x = torch.randn(4, 16, 20, 20, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    ratios[groups] = backward.get_total_flops() / forward.get_total_flops()
print(f"torch {torch.__version__}, operations backward over forward, by groups")
print(f"expected: {dict.fromkeys(ratios, 2.0)}")
print(f"seen: {ratios}")
sys.exit(0 if ratios == {1: 2.0, 4: 5.0, 16: 17.0} else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
