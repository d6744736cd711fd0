"""`devices`: what this machine or a cluster offers."""

from __future__ import annotations

from pipeline.cli.options import DevicesOption, SchedulerOption
from pipeline.cli.ranks import cluster


def devices(devices: DevicesOption = None, scheduler: SchedulerOption = None) -> None:
    """Show the devices of this machine, or of a running cluster."""
    from rich.console import Console
    from rich.table import Table

    with cluster(devices, scheduler) as (_, members):
        table = Table("device", "worker", "threads", "speed", "hardware", "host")
        for member in members:
            device = member.device
            speed = f"{device.speed:g} (emulated)" if device.emulated else "1"
            table.add_row(device.label, member.name, str(device.threads), speed, member.hardware, member.host)
        Console().print(table)
