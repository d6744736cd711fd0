"""What the study itself took: wall time and memory of its measuring jobs, read from what they noted."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from pipeline.config import Config, calibrations, groups, load_config, slug

MEMORY_LIMIT_GIB = 8
"""What a study on two cores may hold at most, as this project sets itself."""

COLUMNS = ("stage", "job", "wall_s", "peak_memory_gib")
NOT_NOTED = "How long the jobs of this study took was not noted."


def usage(outputs: Path, study: Config) -> pd.DataFrame:
    """A row for each measuring job of the study that has noted its usage in `outputs`/logs, stage by stage."""
    jobs = [("calibration", f"{slug(network)}/{slug(devices)}") for network, devices in calibrations(study)]
    jobs += [("timing", group) for group in groups(study)]
    jobs += [("miscalibration", ""), ("simulation", ""), ("accuracy", "")]
    rows = []
    for stage, job in jobs:
        file = outputs / "logs" / (f"{stage}/{job}.usage.json" if job else f"{stage}.usage.json")
        if file.exists():
            noted = json.loads(file.read_text(encoding="utf-8"))
            rows.append((stage, job or stage, noted["wall_s"], noted["peak_memory_bytes"] / 2**30))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def usage_finding(table: pd.DataFrame) -> str:
    """Wall time of all jobs together and the one that held most memory, and both by stage (reStructuredText)."""
    if table.empty:
        return f"{NOT_NOTED}\n"
    hungriest = table.sort_values("peak_memory_gib").iloc[-1]
    within = "within" if hungriest["peak_memory_gib"] <= MEMORY_LIMIT_GIB else "above"
    together = (
        f"The {len(table)} measuring jobs of this study took {table['wall_s'].sum():.0f} s of wall time, one after the "
        f"other. The hungriest, ``{hungriest['job']}`` of {hungriest['stage']}, held "
        f"{hungriest['peak_memory_gib']:.2f} GiB in all its processes, {within} the limit of {MEMORY_LIMIT_GIB} GiB."
    )
    header = _row("stage", "jobs", "wall time in s", "longest job in s", "most memory of a job in GiB")
    lines = [together, "", ".. list-table::", "   :header-rows: 1", "", *header]
    for stage, jobs in table.groupby("stage", sort=False):
        wall_s, memory_gib = jobs["wall_s"], jobs["peak_memory_gib"]
        lines += _row(
            str(stage), str(len(jobs)), f"{wall_s.sum():.0f}", f"{wall_s.max():.0f}", f"{memory_gib.max():.2f}"
        )
    return "\n".join(lines) + "\n"


def write_usage(outputs: Path, folder: Path) -> Path:
    """Write the finding as `folder`/usage.rst; without a configuration in `outputs` it says that nothing was noted."""
    configuration = outputs / "configuration.yaml"
    table = (
        usage(outputs, load_config(configuration)) if configuration.exists() else pd.DataFrame(columns=list(COLUMNS))
    )
    written = folder / "usage.rst"
    folder.mkdir(parents=True, exist_ok=True)
    written.write_text(usage_finding(table), encoding="utf-8")
    return written


def _row(first: str, *others: str) -> list[str]:
    return [f"   * - {first}", *(f"     - {text}" for text in others)]
