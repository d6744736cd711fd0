"""The file of records, and the table made of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.zoo.judging import AMPLIFIED, TOLERANCE, VERDICTS, Record
from tests.zoo.training import SHARES, STRATEGIES

_COLUMNS = ("network", "package", "parameters", *STRATEGIES, "split", "opaque, and why", "capture", "verdict")
_MOST_OPAQUE = 3


def read(path: Path) -> dict[str, Record]:
    """The last record of each network; a line that an interruption left unfinished counts for nothing."""
    found: dict[str, Record] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[record["network"]] = record
    return found


def append(path: Path, record: Record) -> None:
    """Add a record to the file, on a line of its own whatever an interruption left before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if unfinished else "") + json.dumps(record) + "\n")


def line(record: Record) -> str:
    """A record on one line of the screen."""
    told = [f"{record['verdict']:9}{record['network']:42}"]
    if "parameters" in record:
        told.append(f"{record['parameters'] / 1e6:6.2f} M")
    for strategy, difference in record["difference"].items():
        told.append(f"{strategy} {_difference(record, strategy, difference)}, split {_part(record['split'][strategy])}")
    if record.get("opaque"):
        told.append(f"opaque: {_opaque(record)}")
    if "capture_s" in record:
        told.append(f"captured in {record['capture_s']:.1f} s")
    if record["verdict"] == "wrong":
        told.append("farthest off: " + ", ".join(dict.fromkeys(record["farthest"].values())))
    if "sentence" in record:
        told.append(record["sentence"])
    return "  ".join(told)


def table(records: Sequence[Record]) -> str:
    """The page, in Markdown: a summary, what the columns are, and a row for each network."""
    rows = ["| " + " | ".join(_row(record)) + " |" for record in records]
    head = "| " + " | ".join(_COLUMNS) + " |"
    packages = {f"{one['package']} {one['version']}" for one in records}
    shares = " : ".join(map(str, SHARES))
    made_with = ", ".join(sorted(packages))
    return f"""# Networks of other packages

{summary(records)}

Each was trained for three steps of 6, 6 and 5 random images in float64, split {shares} over a CPU and one of emulated
half speed, by `kernel` and by `batch`, and in a plain loop: SGD with momentum, the same seeds. A difference is the
largest of the losses and of what is in the state dictionary, relative to the tensor's largest entry. Where it is
beyond {TOLERANCE:g}, the one in brackets is that of the same plain loop from weights moved by one rounding, for the
same tensor: up to {AMPLIFIED} times that is rounding that the network amplifies. Split is the part of the
convolutions' FLOPs that ran on both devices; capture is in seconds, beside whatever else ran. Most networks are cut
down: small images, and few
equal blocks in a row.
`make zoo ZOO_ARGS=--fresh` makes this table anew; it was made with {made_with}.

{head}
|{" --- |" * len(_COLUMNS)}
{chr(10).join(rows)}
"""


def summary(records: Sequence[Record]) -> str:
    """How many of each verdict, and how many are split nearly whole."""
    counted = Counter(record["verdict"] for record in records)
    verdicts = ", ".join(f"{counted[verdict]} {verdict}" for verdict in VERDICTS if counted[verdict])
    whole = sum(all(part > 0.9 for part in one["split"].values()) for one in records if one["split"])
    opaque = sum(bool(record.get("opaque")) for record in records)
    return (
        f"**{len(records)} networks: {verdicts or 'none yet'}; {whole} with more than 90 % of the convolutions split, "
        f"{opaque} with a part that runs whole.**"
    )


def _row(record: Record) -> list[str]:
    parameters = f"{record['parameters'] / 1e6:.2f} M" if "parameters" in record else ""
    differences = [
        _difference(record, strategy, record["difference"][strategy]) if strategy in record["difference"] else ""
        for strategy in STRATEGIES
    ]
    split = " / ".join(dict.fromkeys(_part(part) for part in record["split"].values()))
    capture = f"{record['capture_s']:.1f}" if "capture_s" in record else ""
    verdict = record["verdict"] + (f": {record['sentence']}" if "sentence" in record else "")
    network = record["network"].split(" ", 1)[1]
    package = f"{record['package']} {record['version']}"
    cells = [network, package, parameters, *differences, split, _opaque(record), capture, verdict]
    return [cell.replace("|", "/").replace("\n", " ") for cell in cells]


def _difference(record: Mapping[str, dict[str, float]], strategy: str, difference: float) -> str:
    moved = f" ({record['moved'][strategy]:.0e})" if strategy in record["moved"] else ""
    return f"{difference:.0e}{moved}"


def _part(part: float) -> str:
    return "no convolution" if math.isnan(part) else f"{part:.2f}"


def _opaque(record: Record) -> str:
    parts = record.get("opaque") or []
    told = "; ".join(f"{name}: {reason}" for name, reason in parts[:_MOST_OPAQUE])
    return told + (f"; and {len(parts) - _MOST_OPAQUE} more" if len(parts) > _MOST_OPAQUE else "")
