#!/usr/bin/env bash
# Empty text that has been through Zarr counts as missing in xarray: fillna overwrites it, dropna drops its row.
#
# Package:  xarray 2026.9.0, zarr 3.1.6, numpy 2.4.6
# Expected: '' is a value, as it is before the data set is written, and a gap (None or NaN) stays apart from it.
# Seen:     text comes back as numpy's StringDType without a missing value. Gaps were written as '', and xarray takes
#           every '' of that type for a gap. identical() still says that the data set is the one that was written.
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
notes = np.array(["", "disturbed", "", "late"], dtype=object)
written = xr.Dataset({"time": ("run", [1.0, 2.0, 3.0, 4.0]), "note": ("run", notes)})
store = tempfile.mkdtemp()
written.to_zarr(store, mode="w")
with xr.open_zarr(store) as opened:
    read = opened.load()


def seen_in(data):
    return int(data["note"].isnull().sum()), data["note"].fillna("?").values.tolist(), data.dropna("run").sizes["run"]


print(f"xarray {xr.__version__}, zarr {zarr.__version__}, numpy {np.__version__}")
print(f"notes missing, notes after fillna('?'), runs after dropna; identical: {read.identical(written)}")
print(f"expected: {seen_in(written)}")
print(f"seen: {seen_in(read)}")
as_written = seen_in(written) == (0, ["", "disturbed", "", "late"], 4)
sys.exit(0 if as_written and seen_in(read) == (2, ["?", "disturbed", "?", "late"], 2) else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
