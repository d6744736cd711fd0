#!/usr/bin/env bash
# Text that xarray has read from a Zarr store can no longer be reindexed, masked or merged.
#
# Package:  xarray 2026.9.0, zarr 3.1.6, numpy 2.4.6
# Expected: a data set read from a store does what it did before it was written.
# Seen:     text of variable length comes back as numpy's StringDType, for which reindex, where and an outer merge raise
#           DTypePromotionError as soon as a gap has to be filled: with NaN, which is no string.
#
# Exit: 0 if it still is as seen here, 1 if it has changed, 2 if it could not be tried. README.md tells the rest.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
    python3 -m venv "$folder/venv" || exit 2
    "$python" -m pip install --quiet --disable-pip-version-check 'xarray==2026.9.0' 'zarr==3.1.6' 'numpy==2.4.6' 'pandas==3.1.1' || exit 2
fi

cat >"$folder/finding.py" <<'PY'
import sys
import tempfile
import warnings

import numpy as np
import xarray as xr
import zarr

warnings.simplefilter("ignore")
text = np.array(["cpu", "gpu"], dtype=object)
written = xr.Dataset({"device": ("rank", text)}, coords={"rank": [0, 1]})
store = tempfile.mkdtemp()
written.to_zarr(store, mode="w")
with xr.open_zarr(store) as opened:
    read = opened.load()
one_more = xr.Dataset({"time": ("rank", [1.0])}, coords={"rank": [2]})
actions = {
    "reindex": lambda data: data.reindex(rank=[0, 5]),
    "where": lambda data: data.where(data["rank"] > 0),
    "merge": lambda data: xr.merge([data, one_more], join="outer", compat="no_conflicts"),
}
print(f"xarray {xr.__version__}, zarr {zarr.__version__}, numpy {np.__version__}")
print(f"dtype written: {written['device'].dtype}, read: {read['device'].dtype}, identical: {read.identical(written)}")
failed = []
for name, action in actions.items():
    action(written)
    try:
        action(read)
        print(f"{name}: expected to pass, seen to pass")
    except TypeError as error:
        print(f"{name}: expected to pass, seen {type(error).__name__}: {str(error)[:80]}...")
        failed.append(name)
sys.exit(0 if len(failed) == len(actions) else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
