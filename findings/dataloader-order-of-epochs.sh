#!/usr/bin/env bash
# For one seed, the shuffled order of the second epoch depends on persistent_workers, and on loaders that do not
# shuffle.
#
# Package:  torch 2.13.0 (torch.utils.data)
# Expected: persistent_workers=True saves the start of processes; evaluating with a loader that draws nothing leaves the
#           training loader's order as it is.
# Seen:     both change the order from the second epoch on. Each iteration draws a seed for workers, even without
#           workers and without shuffling, from torch's generator; persistent workers save that draw, too.
#
# A generator passed to the loader (generator=) keeps evaluation out of it, but not persistent_workers.
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
from torch.utils.data import DataLoader, TensorDataset

data = TensorDataset(torch.arange(8))


def orders(*, evaluate=False, **options):
    torch.manual_seed(0)
    training = DataLoader(data, batch_size=8, shuffle=True, num_workers=1, **options)
    epochs = []
    for _ in range(3):
        epochs.append([batch.tolist() for (batch,) in training][0])
        if evaluate:
            list(DataLoader(data, batch_size=8))
    return epochs


if __name__ == "__main__":
    plain, persistent, evaluated = orders(), orders(persistent_workers=True), orders(evaluate=True)
    print(f"torch {torch.__version__}, order of eight images in three epochs")
    print("expected: the same three times")
    print(f"seen: {plain} plain")
    print(f"seen: {persistent} with persistent_workers=True")
    print(f"seen: {evaluated} with an unshuffled loader in between")
    first = plain[0] == persistent[0] == evaluated[0]
    sys.exit(0 if first and plain[1] != persistent[1] and plain[1] != evaluated[1] else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
