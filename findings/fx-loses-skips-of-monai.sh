#!/usr/bin/env bash
# torch.fx traces MONAI's BasicUNet without an error, and leaves out all of its skip connections.
#
# Package:  monai 1.6.1, torch 2.13.0 (torch.fx)
# Expected: the trace of a U-Net of four levels has the four concatenations of its skips, or tracing fails.
# Seen:     MONAI asks torch.jit.isinstance(x, torch.Tensor) before it concatenates; a proxy of fx is no tensor, so the
#           other branch is traced. The graph has no concatenation and fails when it is run, for its shapes.
#           torch.export keeps them.
#
# Exit: 0 if it still is as seen here, 1 if it has changed, 2 if it could not be tried. README.md tells the rest.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
    python3 -m venv "$folder/venv" || exit 2
    "$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.6' 'monai==1.6.1' || exit 2
fi

cat >"$folder/finding.py" <<'PY'
import sys
import warnings

warnings.simplefilter("ignore")

import monai  # noqa: E402
import torch  # noqa: E402
from monai.networks.nets import BasicUNet  # noqa: E402

torch.manual_seed(0)
model, x = BasicUNet(2, 1, 2, features=(8, 8, 16, 16, 32, 8)).eval(), torch.randn(2, 1, 64, 64)


def concatenations(graph):
    return sum("cat" in str(node.target) for node in graph.nodes if node.op == "call_function")


traced = torch.fx.symbolic_trace(model)
exported = torch.export.export(model, (x,))
try:
    traced(x)
    runs = "runs"
except RuntimeError as error:
    runs = f"fails: {str(error)[:80]}..."
print(f"monai {monai.__version__}, torch {torch.__version__}")
print(f"expected: {concatenations(exported.graph)} concatenations, as torch.export finds")
print(f"seen: {concatenations(traced.graph)} concatenations; the traced network {runs}")
sys.exit(0 if concatenations(traced.graph) == 0 and concatenations(exported.graph) == 4 and runs != "runs" else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
