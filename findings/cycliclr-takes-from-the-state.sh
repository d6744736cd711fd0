#!/usr/bin/env bash
# CyclicLR.load_state_dict takes an entry out of the dictionary that it is given, so a state can be loaded once only.
#
# Package:  torch 2.13.0 (torch.optim.lr_scheduler)
# Expected: load_state_dict reads its argument, as every other scheduler's does; two schedulers can be set from one
#           state.
# Seen:     the entry _scale_fn_custom is gone from the caller's dictionary after the first call; the second one raises
#           KeyError, as does loading a checkpoint that was saved from that dictionary.
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
from torch.optim.lr_scheduler import CyclicLR

optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1, momentum=0.9)
scheduler = CyclicLR(optimizer, 0.01, 0.1, 3)
state = scheduler.state_dict()
before = set(state)
scheduler.load_state_dict(state)
taken = sorted(before - set(state))
try:
    scheduler.load_state_dict(state)
    second = "passes"
except KeyError as error:
    second = f"raises KeyError: {error}"
print(f"torch {torch.__version__}")
print("expected: nothing is taken, loading again passes")
print(f"seen: {taken} taken, loading again {second}")
sys.exit(0 if taken and second != "passes" else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
