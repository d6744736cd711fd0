#!/usr/bin/env bash
# A Dask task that is pinned to a worker by name waits for ever when that worker is restarted under the same name.
#
# Package:  dask and distributed 2026.8.0
# Expected: submit(..., workers=[name]) is for the worker of that name: after the nanny has restarted it, the task runs
#           there, or fails.
# Seen:     the name is turned into an address when the task is submitted; the restarted worker has another one. The
#           task stays in the state no-worker, while a new task for the same name runs at once.
#
# The script waits with limits throughout, and takes the task back at the end.
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
import logging
import os
import signal
import sys
import time

import distributed
from distributed import Client, LocalCluster

if __name__ == "__main__":
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": logging.CRITICAL}
    with LocalCluster(**options) as cluster, Client(cluster) as client:

        def workers():
            return {each["name"]: address for address, each in client.scheduler_info()["workers"].items()}

        def state_of(key):
            return client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.tasks[key].state)

        ((name, address),) = workers().items()
        pinned = client.submit(time.sleep, 600, workers=[name], pure=False)
        time.sleep(1)
        os.kill(client.run(os.getpid)[address], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while workers().get(name, address) == address and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(2)
        state, back = state_of(pinned.key), workers().get(name)
        new = client.submit(os.getpid, workers=[name], pure=False)
        new_runs = isinstance(new.result(timeout=30), int)
        print(f"distributed {distributed.__version__}")
        print("expected: the task is processing again on the worker of its name, or has failed")
        print(f"seen: worker {name!r} was at {address}, is at {back}; the pinned task is in state {state!r}")
        print(f"seen: a new task for {name!r} runs: {new_runs}")
        pinned.cancel()
    sys.exit(0 if state == "no-worker" and back not in (None, address) and new_runs else 1)
PY
TMPDIR=$folder "$python" "$folder/finding.py"
