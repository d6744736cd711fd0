"""`python -m tests.zoo [NETWORK...]`: train the networks of other packages split and whole, and make docs/zoo.md.

It prints a line for each and keeps it in outputs/zoo.jsonl. Without names it goes on with those that have no record
yet, and writes the table when all have one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from tests.zoo import results
from tests.zoo.judging import Record, is_fault
from tests.zoo.networks import NETWORKS
from tests.zoo.session import train
from tests.zoo.specimen import Specimen

_RESULTS = Path("outputs/zoo.jsonl")
_TABLE = Path("docs/zoo.md")
_START_S = 60.0
"""What a process may take before its first network: imports and a cluster."""


def main() -> int:
    """Exit code 1 if a network ended wrong, crashed or was refused without a reason of ours."""
    arguments = _arguments()
    if arguments.list:
        print("\n".join(NETWORKS))
        return 0
    if arguments.fresh:
        _RESULTS.unlink(missing_ok=True)
    for record in _records(_chosen(arguments), arguments.limit):
        results.append(_RESULTS, record)
        print(results.line(record), flush=True)
    found = results.read(_RESULTS)
    known = [found[name] for name in NETWORKS if name in found]
    print(results.summary(known).strip("*"))
    if len(known) == len(NETWORKS) or arguments.table:
        _TABLE.parent.mkdir(exist_ok=True)
        _TABLE.write_text(results.table(known), encoding="utf-8")
        print(f"The table is in {_TABLE}.")
    else:
        print(f"{len(NETWORKS) - len(known)} are left; the table is written when all are done, or with --table.")
    faults = [record["network"] for record in known if is_fault(record, NETWORKS[record["network"]].refusal)]
    if faults:
        print(f"To be put right: {', '.join(faults)}")
    return int(bool(faults))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("networks", nargs="*", help="names, or parts of names, of networks to train, anew if need be")
    parser.add_argument("--fresh", action="store_true", help="forget all records and start anew")
    parser.add_argument("--again", action="store_true", help="train anew what did not end exact or as rounding")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one network (default: 300)")
    parser.add_argument("--table", action="store_true", help="write the table in any case, of what there is")
    parser.add_argument("--list", action="store_true", help="only tell the names")
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace) -> list[str]:
    """Names of the networks to train now."""
    if arguments.networks:
        chosen = []
        for part in arguments.networks:
            named = [name for name in NETWORKS if name == part] or [name for name in NETWORKS if part in name]
            if not named:
                sys.exit(f"no network of the zoo has '{part}' in its name; --list tells all names")
            chosen += named
        return list(dict.fromkeys(chosen))
    found = results.read(_RESULTS)
    return [
        name
        for name, specimen in NETWORKS.items()
        if name not in found or (arguments.again and is_fault(found[name], specimen.refusal))
    ]


def _records(names: Sequence[str], limit_s: float) -> Iterator[Record]:
    """A record of each network, from a process that is replaced when it hangs, dies or ends after a crash."""
    left = list(names)
    while left:
        for record in _session_records(tuple(left), limit_s):
            yield record
            left.remove(record["network"])


def _session_records(names: Sequence[str], limit_s: float) -> Iterator[Record]:
    """Records from one process; the last may be of a network that it did not survive."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(names, sender))
    process.start()
    sender.close()
    extra_s, patience_s = _START_S, 0.0
    try:
        for name in names:
            try:
                record = _received(receiver, limit_s + extra_s)
            except TimeoutError:
                yield _lost(NETWORKS[name], f"no end after {limit_s:g} s")
                return
            except EOFError:
                process.join(_START_S)
                yield _lost(NETWORKS[name], f"the process ended, exit code {process.exitcode}")
                return
            yield record
            extra_s = 0.0
            if record["verdict"] == "crashed":
                break
        patience_s = _START_S
    finally:
        _end(process, patience_s)


def _received(receiver: Connection, limit_s: float) -> Record:
    if not receiver.poll(limit_s):
        raise TimeoutError
    record: Record = receiver.recv()
    return record


def _lost(specimen: Specimen, sentence: str) -> Record:
    return {
        "network": specimen.name, "package": specimen.package, "version": specimen.version, "note": specimen.note,
        "difference": {}, "moved": {}, "split": {}, "farthest": {}, "verdict": "crashed", "sentence": sentence,
    }  # fmt: skip


def _end(process: multiprocessing.process.BaseProcess, patience_s: float) -> None:
    """Let a process end by itself if it does so in time; otherwise end it and all that it started."""
    process.join(patience_s)
    if process.is_alive() and process.pid is not None:
        for ending in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, ending)
            except ProcessLookupError:
                break
            time.sleep(1)
        process.kill()  # where it has no group of its own yet
    process.join()


if __name__ == "__main__":
    sys.exit(main())
