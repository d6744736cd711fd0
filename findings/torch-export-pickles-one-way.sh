#!/usr/bin/env bash
# An exported program can be pickled, and cloudpickled, as Dask does; it cannot be read again.
#
# Package:  torch 2.13.0 (torch.export), cloudpickle 3.1.3
# Expected: pickle.dumps(program) fails at once, or pickle.loads gives the program back.
# Seen:     dumps, torch.save and cloudpickle write without a complaint; reading raises TypeError about
#           _ModuleStackTracer.__init__: on another machine, or in another week. torch.export.save and load work.
#
# Exit: 0 if it still is as seen here, 1 if it has changed, 2 if it could not be tried. README.md tells the rest.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
    python3 -m venv "$folder/venv" || exit 2
    "$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.6' 'cloudpickle==3.1.3' || exit 2
fi

cat >"$folder/finding.py" <<'PY'
import io
import pickle
import sys

import cloudpickle
import torch
from torch import nn

program = torch.export.export(nn.Conv2d(1, 2, 3), (torch.randn(2, 1, 6, 6),))


def save(save_to):
    buffer = io.BytesIO()
    save_to(buffer)
    return buffer.getvalue()


written = {
    "pickle": pickle.dumps(program),
    "cloudpickle": cloudpickle.dumps(program),
    "torch.save": save(lambda buffer: torch.save(program, buffer)),
    "torch.export.save": save(lambda buffer: torch.export.save(program, buffer)),
}
read = {
    "pickle": pickle.loads,
    "cloudpickle": pickle.loads,
    "torch.save": lambda data: torch.load(io.BytesIO(data), weights_only=False),
    "torch.export.save": lambda data: torch.export.load(io.BytesIO(data)),
}
print(f"torch {torch.__version__}, cloudpickle {cloudpickle.__version__}")
print("expected: what was written can be read")
failed = []
for name, data in written.items():
    try:
        read[name](data)
        print(f"seen: {name}: {len(data)} bytes written, read")
    except TypeError as error:
        print(f"seen: {name}: {len(data)} bytes written, TypeError on reading: {error}")
        failed.append(name)
sys.exit(0 if failed == ["pickle", "cloudpickle", "torch.save"] else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
