#!/usr/bin/env bash
# torch.set_flush_denormal(True) flushes a part of each tensor only, where threads of torch were running before.
#
# Package:  torch 2.13.0, CPU with flush-to-zero, two OpenMP threads
# Expected: after set_flush_denormal(True) denormal numbers are flushed to zero in the whole of a tensor, whatever was
#           computed before.
# Seen:     only the elements that the calling thread computes are flushed. OpenMP threads that an earlier operation
#           started go on without: of a tensor of equal denormals one half becomes zero, the other does not.
#
# The documentation does not say that the setting is one of the calling thread, which threads started later inherit. So
# results, and the time that a convolution with denormals takes, depend on whether anything ran in parallel before the
# call.
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

torch.set_num_threads(2)
denormals = torch.full((4_000_000,), 1e-40)


def share_of_zeros():
    return torch.count_nonzero(denormals.mul(1.0) == 0).item() / denormals.numel()


before = share_of_zeros()  # starts the second thread
if not torch.set_flush_denormal(True):
    print("this processor cannot flush denormals")
    sys.exit(2)
after = share_of_zeros()
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
print("expected: a share of 0 is flushed before the call, of 1 after it")
print(f"seen: {before} before, {after} after")
sys.exit(0 if before == 0 and 0 < after < 1 else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
