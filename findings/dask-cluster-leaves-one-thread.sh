#!/usr/bin/env bash
# After a LocalCluster, even a closed one, later processes of the same program compute with one thread.
#
# Package:  dask and distributed 2026.8.0
# Expected: what a cluster sets for its workers ends with it: the environment of the program is as before.
# Seen:     the nanny writes OMP_NUM_THREADS=1, its kin of MKL and OpenBLAS, and MALLOC_TRIM_THRESHOLD_ into os.environ
#           of the program that starts the cluster. They stay, and every process that it starts later inherits them:
#           torch there uses one core.
#
# Exit: 0 if it still is as seen here, 1 if it has changed, 2 if it could not be tried. README.md tells the rest.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
    python3 -m venv "$folder/venv" || exit 2
    "$python" -m pip install --quiet --disable-pip-version-check 'dask==2026.8.0' 'distributed==2026.8.0' || exit 2
fi

cat >"$folder/finding.py" <<'PY'
import os
import subprocess
import sys

import distributed
from distributed import Client, LocalCluster

NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_")


def of_a_new_process():
    code = f"import os; print({{name: os.environ.get(name) for name in {NAMES}}})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    for name in NAMES:
        os.environ.pop(name, None)
    before = of_a_new_process()
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
        pass
    after = of_a_new_process()
    print(f"distributed {distributed.__version__}, environment of a new process")
    print(f"expected: {before}")
    print(f"seen: {after}")
    sys.exit(0 if before != after and os.environ.get("OMP_NUM_THREADS") == "1" else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
