#!/usr/bin/env bash
# safetensors saves conj() of a complex tensor without the conjugation, and a lazily negated tensor with the wrong sign.
#
# Package:  safetensors 0.8.0, torch 2.13.0
# Expected: save_file({'x': z.conj()}) stores the numbers that z.conj() shows, or refuses the view, as it does with
#           strides.
# Seen:     z.conj() only sets a bit on the same memory, which is written as it lies: the file holds z. The negative bit
#           likewise. torch.save keeps both.
#
# Exit: 0 if it still is as seen here, 1 if it has changed, 2 if it could not be tried. README.md tells the rest.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
    python3 -m venv "$folder/venv" || exit 2
    "$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.6' 'safetensors==0.8.0' || exit 2
fi

cat >"$folder/finding.py" <<'PY'
import importlib.metadata
import io
import sys

import safetensors.torch
import torch

z = torch.tensor([1 + 2j, 3 - 4j])
# The imaginary part of a conjugate is a negative view; of one number it is contiguous, so safetensors takes it.
views = {"conjugate": z.conj(), "negative": torch.tensor([[1 + 2j]]).conj().imag}
print(f"safetensors {importlib.metadata.version('safetensors')}, torch {torch.__version__}")
wrong = []
for name, view in views.items():
    read = safetensors.torch.load(safetensors.torch.save({"x": view}))["x"]
    buffer = io.BytesIO()
    torch.save(view, buffer)
    buffer.seek(0)
    kept = torch.equal(torch.load(buffer), view)
    print(f"{name}: expected {view.tolist()}, seen {read.tolist()}; torch.save keeps it: {kept}")
    other = -view if name == "negative" else view.conj()
    wrong.append(kept and torch.equal(read, other.resolve_neg().resolve_conj()) and not torch.equal(read, view))
sys.exit(0 if all(wrong) else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
