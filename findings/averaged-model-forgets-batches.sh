#!/usr/bin/env bash
# AveragedModel(use_buffers=True) averages num_batches_tracked in whole numbers: after 200 batches it says 1.
#
# Package:  torch 2.13.0 (torch.optim.swa_utils)
# Expected: the averaged count of batches is about 100 (the mean of 1 to 200), or the 200 of the model.
# Seen:     it stays 1, as each small step of the average is cut off. A BatchNorm with momentum=None, which divides by
#           that count, then gives the next batch half of the weight.
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
from torch.optim.swa_utils import AveragedModel

torch.manual_seed(0)
model = nn.BatchNorm2d(1, momentum=None)  # the running mean is that of all batches
averaged = AveragedModel(model, use_buffers=True)
for _ in range(200):
    model(torch.randn(16, 1, 4, 4))
    averaged.update_parameters(model)
count = averaged.module.num_batches_tracked.item()
before = averaged.module.running_mean.item()
averaged.train()(torch.full((16, 1, 4, 4), 100.0))
weight = (averaged.module.running_mean.item() - before) / (100 - before)
print(f"torch {torch.__version__}, 200 batches")
print(f"expected: about 100 to 200 batches; one more batch weighs about {1 / 200}")
print(f"seen: {count} batches; one more batch weighs {weight:.3f}")
sys.exit(0 if count == 1 and abs(weight - 0.5) < 1e-3 else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
