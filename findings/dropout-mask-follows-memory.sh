#!/usr/bin/env bash
# With one seed, dropout of the same tensor has another mask if the tensor is channels_last.
#
# Package:  torch 2.13.0, CPU
# Expected: a memory format changes speed, not values: with the same seed dropout(x) is the same tensor in both formats.
# Seen:     the random numbers are drawn in the order of the memory, so other elements are dropped. dropout2d, whose
#           mask has no height and width, is not concerned.
#
# Whoever compares a run with channels_last to one without, or reproduces one, compares different dropouts.
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
from torch.nn import functional as F

x = torch.rand(2, 8, 16, 16) + 1
kept = {}
for name in ("dropout", "dropout2d"):
    for order in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        kept[name, order] = getattr(F, name)(x.contiguous(memory_format=order), 0.5) != 0
same = {
    name: torch.equal(kept[name, torch.contiguous_format], kept[name, torch.channels_last])
    for name in ("dropout", "dropout2d")
}
print(f"torch {torch.__version__}")
print("expected: the same mask in both memory formats")
print("seen:", ", ".join(f"{name} {'the same' if equal else 'another'} mask" for name, equal in same.items()))
sys.exit(0 if not same["dropout"] and same["dropout2d"] else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
