#!/usr/bin/env bash
# A network captured by torch.export has other gradients: hooks on tensors and modules and custom backward passes are
# dropped.
#
# Package:  torch 2.13.0 (torch.export)
# Expected: what export cannot keep of a network in training mode it refuses, or warns of.
# Seen:     without a word it drops tensor.register_hook in forward, full backward hooks of modules, and the backward
#           pass of a custom autograd.Function, which it replaces by that of the operations inside.
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


class Clip(torch.autograd.Function):
    """Clamps forward, passes the gradient on backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(-0.1, 0.1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Custom(nn.Linear):
    def forward(self, x):
        return Clip.apply(super().forward(x))


class TensorHook(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: 10 * gradient)
        return y


def gradient(model, x):
    x = x.clone().requires_grad_()
    model(x).sum().backward()
    return x.grad


torch.manual_seed(0)
x = torch.randn(4, 8)
hooked = nn.Sequential(nn.Linear(8, 8))
hooked[0].register_full_backward_hook(lambda module, inputs, outputs: tuple(10 * each for each in inputs))
other = []
print(f"torch {torch.__version__}")
print("expected: the same gradients, or an error or a warning")
for name, model in {
    "tensor.register_hook": TensorHook(8, 8),
    "full backward hook": hooked,
    "custom autograd.Function": Custom(8, 8),
}.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        captured = torch.export.export(model, (x,)).module()
    whole, part = gradient(model, x), gradient(captured, x)
    same_output = torch.equal(model(x), captured(x))
    print(f"seen: {name}: same output {same_output}, same gradient {torch.equal(whole, part)}, {len(caught)} warnings")
    other.append(same_output and not torch.allclose(whole, part) and not caught)
sys.exit(0 if all(other) else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
