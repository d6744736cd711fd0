#!/usr/bin/env bash
# torchinfo counts the operations of a transposed convolution too high, by the square of its stride.
#
# Package:  torchinfo 1.8.0, torch 2.13.0
# Expected: ConvTranspose2d multiplies each number of its input with each weight of its channel: mult-adds are input
#           positions times weights.
# Seen:     torchinfo counts output positions times weights: 4 times too many for stride 2, 16 times for stride 4, as in
#           the decoder of a U-Net. Conv2d is counted right.
#
# Exit: 0 if it still is as seen here, 1 if it has changed, 2 if it could not be tried. README.md tells the rest.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
    python3 -m venv "$folder/venv" || exit 2
    "$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.6' 'torchinfo==1.8.0' || exit 2
fi

cat >"$folder/finding.py" <<'PY'
import sys

import torch
import torchinfo
from torch import nn

x = torch.randn(1, 16, 20, 20)
layers = {
    "Conv2d(3x3)": nn.Conv2d(16, 32, 3, padding=1, bias=False),
    "ConvTranspose2d(2x2, stride 2)": nn.ConvTranspose2d(16, 32, 2, stride=2, bias=False),
    "ConvTranspose2d(4x4, stride 4)": nn.ConvTranspose2d(16, 32, 4, stride=4, bias=False),
}
print(f"torchinfo {torchinfo.__version__}, torch {torch.__version__}")
ratios = []
for name, layer in layers.items():
    exact = 20 * 20 * layer.weight.numel()
    counted = torchinfo.summary(layer, input_data=x, verbose=0).total_mult_adds
    print(f"{name}: expected {exact}, seen {counted}")
    ratios.append(counted / exact)
sys.exit(0 if ratios == [1, 4, 16] else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
