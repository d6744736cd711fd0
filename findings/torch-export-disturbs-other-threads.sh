#!/usr/bin/env bash
# While one thread exports a network, convolutions of all other threads run without oneDNN, and with other results.
#
# Package:  torch 2.13.0 (torch.export), x86 CPU
# Expected: an export of one network leaves what other threads compute at that time as it is.
# Seen:     oneDNN (torch.backends.mkldnn) is off for the whole process until the export ends. A convolution in another
#           thread takes another algorithm: slower, and with other last bits.
#
# In a process with several threads, such as a worker of Dask or a server, results are then not repeatable: they depend
# on whether something was exported meanwhile.
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
import threading

import torch
from torch import nn

layer, x = nn.Conv2d(64, 64, 3), torch.randn(4, 64, 20, 20)
exporting, computed = threading.Event(), threading.Event()
during = {}


class Waits(nn.Module):
    """Lets the other thread compute while this module is traced."""

    def forward(self, x):
        exporting.set()
        computed.wait(60)
        return x + 1


def other_thread():
    exporting.wait(60)
    during["enabled"], during["output"] = torch.backends.mkldnn.enabled, layer(x).detach()
    computed.set()


if not torch.backends.mkldnn.is_available():
    print("this build has no oneDNN")
    sys.exit(2)
torch.manual_seed(0)
before = layer(x).detach()
thread = threading.Thread(target=other_thread)
thread.start()
torch.export.export(Waits(), (torch.randn(2),))
thread.join()
after = layer(x).detach()
print(f"torch {torch.__version__}")
print("expected: oneDNN stays enabled, the output of the other thread's convolution is the same")
print(f"seen: enabled {during['enabled']} meanwhile, {torch.backends.mkldnn.enabled} afterwards;", end=" ")
print(f"same output meanwhile {torch.equal(before, during['output'])}, afterwards {torch.equal(before, after)}")
sys.exit(0 if not during["enabled"] and torch.backends.mkldnn.enabled and torch.equal(before, after) else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
