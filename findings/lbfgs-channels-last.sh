#!/usr/bin/env bash
# LBFGS and parameters_to_vector fail for a convolution whose weights are channels_last.
#
# Package:  torch 2.13.0 (torch.optim.LBFGS, torch.nn.utils)
# Expected: model.to(memory_format=torch.channels_last) changes speed only; every optimizer trains such a model.
# Seen:     LBFGS and nn.utils.parameters_to_vector flatten with view and raise RuntimeError; vector_to_parameters
#           passes, but quietly makes the weights contiguous again. SGD and Adam work.
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

x = torch.randn(2, 8, 10, 10).to(memory_format=torch.channels_last)


def conv():
    return nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)


def train(kind):
    model = conv()
    optimizer = kind(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def outcome(action):
    try:
        action()
    except RuntimeError as error:
        return f"RuntimeError: {str(error)[:60]}..."
    return "passes"


model = conv()
nn.utils.vector_to_parameters(torch.cat([each.detach().flatten() for each in model.parameters()]), model.parameters())
seen = {
    "Adam": outcome(lambda: train(torch.optim.Adam)),
    "LBFGS": outcome(lambda: train(torch.optim.LBFGS)),
    "parameters_to_vector": outcome(lambda: nn.utils.parameters_to_vector(conv().parameters())),
}
kept = model.weight.is_contiguous(memory_format=torch.channels_last)
print(f"torch {torch.__version__}")
print("expected: each passes, and weights stay channels_last")
for name, text in seen.items():
    print(f"seen: {name} {text}")
print(f"seen: after vector_to_parameters the weights are channels_last: {kept}")
failed = seen["LBFGS"] != "passes" and seen["parameters_to_vector"] != "passes"
sys.exit(0 if failed and seen["Adam"] == "passes" and not kept else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
