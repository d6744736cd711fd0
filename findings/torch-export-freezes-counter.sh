#!/usr/bin/env bash
# A counter that a network keeps in an attribute stands still in its export, which agrees in the first step only.
#
# Package:  torch 2.13.0 (torch.export)
# Expected: a number that forward changes (steps of a warm-up, say) is refused or warned of, as other changes of
#           attributes are, or goes on.
# Seen:     export keeps its first value as a constant, without a warning. The first call of the export is exact, each
#           later one is not: a comparison of one step sees nothing.
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
import copy
import sys
import warnings

import torch
from torch import nn


class WarmUp(nn.Module):
    """Scales by the number of calls so far."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Conv2d(1, 2, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * min(self.calls / 10, 1.0)


torch.manual_seed(0)
model, x = WarmUp(), torch.randn(2, 1, 6, 6)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    captured = torch.export.export(copy.deepcopy(model), (x,)).module()
same = [torch.equal(model(x), captured(x)) for _ in range(3)]
print(f"torch {torch.__version__}")
print("expected: [True, True, True], or an error or a warning")
print(f"seen: outputs equal in three calls: {same}, {len(caught)} warnings")
sys.exit(0 if same == [True, False, False] and not caught else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
