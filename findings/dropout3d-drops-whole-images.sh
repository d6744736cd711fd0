#!/usr/bin/env bash
# Dropout3d on a batch of feature maps, and Dropout1d on a batch of vectors, drop whole images without a warning.
#
# Package:  torch 2.13.0
# Expected: on (batch, channels, height, width) Dropout3d drops channels, as Dropout2d does, or warns of the missing
#           axis, as Dropout2d does if one is missing.
# Seen:     the input is taken for one image without a batch: axis 0 for the channels. Half of the images become zeros,
#           silently; Dropout1d does so on (batch, features).
#
# The documentation allows (C, D, H, W) and (C, L); networks that were written when these were batches train on, worse.
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
import warnings

import torch
from torch import nn

found = []
print(f"torch {torch.__version__}, 64 images, p=0.5")
print("expected: no image is zero throughout, or a warning")
for layer, shape in ((nn.Dropout3d(0.5), (64, 32, 8, 8)), (nn.Dropout1d(0.5), (64, 32))):
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = layer(torch.ones(shape))
    zero = sum(not image.any() for image in y)
    whole = all(not image.any() or image.all() for image in y)
    print(f"seen: {type(layer).__name__} on {shape}: {zero} images are zero, {len(caught)} warnings")
    found.append(zero > 16 and whole and not caught)
sys.exit(0 if all(found) else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
